(() => {
  "use strict";
  const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));

  // tables: a click on a head sorts, rows without a number stay last
  const key = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
    return { number, text: cell.textContent.trim(), none: cell.classList.contains("none") };
  };
  const compare = (a, b, sign) => {
    if (a.none !== b.none) return a.none ? 1 : -1;
    if (!Number.isNaN(a.number) && !Number.isNaN(b.number)) return sign * (a.number - b.number);
    return sign * a.text.localeCompare(b.text);
  };
  const sortBy = (table, head, column) => {
    const falling = head.classList.contains("number") || head.classList.contains("bar");
    const before = head.getAttribute("aria-sort");
    const rising = before ? before === "descending" : !falling;
    all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((a, b) => compare(key(a, column), key(b, column), rising ? 1 : -1));
    table.tBodies[0].append(...rows);
  };
  for (const table of all("table.sortable")) {
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.title = head.title || "Sort";
      head.replaceChildren(button);
      button.addEventListener("click", () => sortBy(table, head, column));
    });
  }
})();
