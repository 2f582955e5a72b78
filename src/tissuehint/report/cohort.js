(() => {
  "use strict";
  const byId = (name) => document.getElementById(name);

  // cards: filter by name and state, order by name, tissue or the share of a class
  const holder = byId("slides");
  const cards = Array.from(holder.children);
  const values = new Map(cards.map((card) => [card, JSON.parse(card.dataset.values)]));
  const order = byId("order");
  const keys = new Set(["name", "tissue"]);
  values.forEach((one) => Object.keys(one).forEach((key) => keys.add(key)));
  for (const key of keys) order.add(new Option(key, key));
  const show = () => {
    const word = byId("filter").value.trim().toLowerCase();
    const state = byId("state").value;
    let shown = 0;
    for (const card of cards) {
      const fits = card.dataset.name.toLowerCase().includes(word) && (!state || card.dataset.state === state);
      card.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    byId("nothing").hidden = shown > 0;
  };
  const arrange = () => {
    const key = order.value;
    const sorted = cards.slice().sort((a, b) =>
      key === "name"
        ? a.dataset.name.localeCompare(b.dataset.name)
        : (values.get(b)[key] ?? -1) - (values.get(a)[key] ?? -1));
    holder.append(...sorted);
  };
  byId("filter").addEventListener("input", show);
  byId("state").addEventListener("change", show);
  order.addEventListener("change", arrange);
})();
