(() => {
  "use strict";
  const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
  const byId = (name) => document.getElementById(name);

  // a printed page shows what is folded
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = all("details:not([open])");
    opened.forEach((part) => { part.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));

  // gallery: a chosen layer lies over each image
  const items = byId("gallery")?.querySelector(".items");
  if (!items) return;
  const show = (slider, percent) => {
    slider.value = String(percent);
    const output = slider.parentElement.querySelector("output");
    output.textContent = `${percent} %`;
  };
  const copyOf = (figure, className) => {
    const copy = figure.querySelector("img").cloneNode();
    copy.className = figure.querySelector(".mask") ? `${className} mask` : className;
    return copy;
  };
  const fill = (stack, view) => {
    const base = copyOf(view.layers.get("image"), "base");
    base.alt = view.alt();
    stack.replaceChildren(base);
    const figure = view.layers.get(view.layer);
    if (!figure || view.layer === "image") return;
    const over = copyOf(figure, "over");
    over.alt = "";
    over.style.opacity = String(view.percent / 100);
    stack.append(over);
  };

  class View {
    constructor(article, layer) {
      this.article = article;
      this.title = article.querySelector("h3").textContent;
      this.layers = new Map(all("figure[data-layer]", article).map((figure) => [figure.dataset.layer, figure]));
      this.viewer = article.querySelector(".viewer");
      this.slider = article.querySelector(".viewer input");
      this.percent = Number(this.slider.value);
      this.layer = layer;
      this.layers.forEach((figure, name) => {
        figure.querySelector("button").addEventListener("click", () => this.choose(name));
      });
      this.slider.addEventListener("input", () => this.fade(Number(this.slider.value)));
      this.render();
    }
    get viewable() { return this.layers.has("image"); }
    alt() {
      const figure = this.layers.get(this.layer);
      const over = figure ? figure.querySelector("figcaption").textContent : "nothing";
      return this.layer === "image" ? this.title : `${this.title} with ${over} over it`;
    }
    choose(layer) { this.layer = layer; this.render(); }
    fade(percent) { this.percent = percent; this.render(); }
    render() {
      this.layers.forEach((figure, name) => {
        figure.querySelector("button").setAttribute("aria-pressed", String(name === this.layer));
      });
      show(this.slider, this.percent);
      if (!this.viewable) return;
      this.viewer.hidden = false;
      fill(this.viewer.querySelector(".stack"), this);
      if (large.view === this) renderLarge();
    }
  }

  // one image, enlarged
  const dialog = byId("enlarged");
  const large = { view: null, slider: byId("enlarged-opacity"), radios: all("input[type=radio]", dialog) };
  const renderLarge = () => {
    const view = large.view;
    const stack = dialog.querySelector(".stack");
    byId("enlarged-title").textContent = view.title;
    fill(stack, view);
    const image = stack.querySelector(".base");
    const room = innerHeight - 240;
    const scale = Math.min(3, room / image.getAttribute("height"));
    stack.style.setProperty("--wide", `${Math.round(image.getAttribute("width") * Math.max(scale, 0.5))}px`);
    show(large.slider, view.percent);
    large.radios.forEach((radio) => {
      radio.checked = radio.value === view.layer;
      radio.disabled = !view.layers.has(radio.value);
    });
  };
  const enlarge = (view) => { large.view = view; renderLarge(); if (!dialog.open) dialog.showModal(); };
  const step = (by) => {
    const order = all(".item", items).map((article) => views.find((view) => view.article === article));
    const open = order.filter((view) => view.viewable);
    enlarge(open[(open.indexOf(large.view) + by + open.length) % open.length]);
  };
  large.slider.addEventListener("input", () => large.view.fade(Number(large.slider.value)));
  large.radios.forEach((radio) => radio.addEventListener("change", () => large.view.choose(radio.value)));
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    const view = large.view;
    large.view = null;
    if (view) view.viewer.querySelector(".stack").focus();
  });

  const views = all(".item", items).map((article) => new View(article, items.dataset.shown));
  views.forEach((view) => view.viewer.querySelector(".stack").addEventListener("click", () => enlarge(view)));

  // all images at once
  const controls = byId("gallery").querySelector(":scope > .controls");
  const everywhere = byId("opacity");
  everywhere.addEventListener("input", () => {
    show(everywhere, Number(everywhere.value));
    views.forEach((view) => view.fade(Number(everywhere.value)));
  });
  all("input[type=radio]", controls).forEach((radio) => {
    radio.addEventListener("change", () => views.forEach((view) => view.choose(radio.value)));
  });
  const score = (view) => (view.article.dataset.miou === undefined ? NaN : Number(view.article.dataset.miou));
  const orders = {
    given: (a, b) => a.article.dataset.position - b.article.dataset.position,
    worst: (a, b) => (Number.isNaN(score(a)) - Number.isNaN(score(b))) || score(a) - score(b),
    best: (a, b) => (Number.isNaN(score(a)) - Number.isNaN(score(b))) || score(b) - score(a),
  };
  byId("order").addEventListener("change", (event) => {
    items.append(...[...views].sort(orders[event.target.value]).map((view) => view.article));
  });
})();
