// The page: a list of slides, the viewer of the one in the address, and what is known of it.

import { area, length, percent, roundLength, whole } from "./scale.js";
import { SlideViewer } from "./viewer.js";

const ASK_AGAIN = 10000; // ms, for slides that are new or finished
const STEP = 0.15; // of the view, for arrow keys
const ZOOM = 1.5;

const byId = (id) => document.getElementById(id);
const make = (name, attributes = {}, ...content) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...content);
  return element;
};
const colour = (element, value) => { element.style.background = value; return element; };

let slides = [];
let slide = null; // the opened one
const hidden = new Set(); // names of classes that are not painted, kept from slide to slide

const viewer = new SlideViewer(byId("viewer"), {
  changed: () => rememberView(),
  moving: () => { drawScale(); askLater(); },
  failed: () => say("Some tiles cannot be read: the slide or its map may be damaged or gone."),
});

// ---- the list of slides

const pictureOf = (item) => {
  const wanted = byId("mapped").checked ? "overlay.jpg" : "thumbnail.jpg";
  const name = item.pictures.includes(wanted) ? wanted : item.pictures[0];
  if (!name) return make("span", { class: "picture none" }, "no picture");
  const src = `/slides/${encodeURIComponent(item.key)}/${name}?v=${item.version}`;
  return make("span", { class: "picture" }, make("img", { src, alt: "", loading: "lazy" }));
};

const painted = (item) => item.classes.filter((one) => one.painted);

const barOf = (item) => {
  const parts = painted(item).filter((one) => one.percent > 0);
  const text = parts.map((one) => `${one.name} ${percent(one.percent)}`).join(", ");
  const bar = make("span", { class: "bar", role: "img", "aria-label": text, title: text });
  for (const one of parts) {
    const part = colour(make("span"), one.colour);
    part.style.width = `${one.percent}%`;
    bar.append(part);
  }
  return bar;
};

const legendOf = (item) => make("ul", { class: "legend" }, ...painted(item).filter((one) => one.percent > 0).map((one) =>
  make("li", {}, colour(make("span", { class: "swatch" }), one.colour), `${one.name} ${percent(one.percent)}`)));

const cardOf = (item) => {
  const name = make("span", { class: "name", title: item.name }, item.name);
  if (item.state !== "done") {
    const state = make("span", { class: "meta" }, make("span", { class: `chip ${item.state}` }, item.state));
    const error = item.error ? [make("span", { class: "error", title: item.error }, item.error)] : [];
    return make("li", {}, make("div", { class: `slide ${item.state}` }, pictureOf(item), name, state, ...error));
  }
  const meta = make("span", { class: "meta" }, item.tissue_mm2 === null ? "area unknown" : `${area(item.tissue_mm2)} tissue`);
  const current = slide?.key === item.key ? "true" : null;
  const link = make("a", { class: "slide", href: addressOf(item.key), "data-key": item.key, "aria-current": current },
    pictureOf(item), name, meta, barOf(item), legendOf(item));
  return make("li", {}, link);
};

const fits = (item, words) => {
  const classes = painted(item).filter((one) => one.percent > 0).map((one) => one.name);
  const text = [item.name, item.state, item.error ?? "", ...classes].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
};

const sortValue = (item, order) => {
  if (order === "tissue") return item.tissue_mm2 ?? -1;
  return item.classes.find((one) => `class ${one.name}` === order)?.percent ?? -1;
};

/** The slides that the list shows, in its order. */
const listed = () => {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const order = byId("order").value;
  const kept = slides.filter((item) => fits(item, words));
  if (order !== "name") kept.sort((a, b) => sortValue(b, order) - sortValue(a, order));
  return kept;
};

const drawList = () => {
  const kept = listed();
  const top = byId("list").scrollTop;
  byId("list").replaceChildren(...kept.map(cardOf));
  byId("list").scrollTop = top;
  byId("none").hidden = kept.length > 0;
};

const drawCount = () => {
  const count = (state) => slides.filter((item) => item.state === state).length;
  const parts = [`${slides.length} slide${slides.length === 1 ? "" : "s"}`];
  for (const state of ["failed", "running"]) if (count(state)) parts.push(`${count(state)} ${state}`);
  byId("count").textContent = parts.join(" · ");
};

const drawOrders = () => {
  const names = new Set(slides.flatMap((item) => painted(item).map((one) => one.name)));
  const chosen = byId("order").value;
  const option = (value, text) => make("option", { value, selected: value === chosen }, text);
  byId("order").replaceChildren(option("name", "name"), option("tissue", "tissue area"),
    ...[...names].map((name) => option(`class ${name}`, `share of ${name}`)));
};

const refresh = async () => {
  try {
    const answer = await fetchJson("/api/slides");
    byId("folder").textContent = answer.folder;
    const news = JSON.stringify(answer.slides) !== JSON.stringify(slides);
    slides = answer.slides;
    drawCount();
    if (news) { drawOrders(); drawList(); }
    await reopenIfNew();
  } catch (error) {
    byId("count").textContent = `No answer (${error.message}): start tissuehint view again`;
  }
};

/** A slide that was predicted again is shown as it is now, at the same place. */
const reopenIfNew = async () => {
  const now = slides.find((item) => item.key === slide?.key);
  if (now?.state !== "done" || now.version === slide.version) return;
  const found = await fetchJson(`/api/slides/${encodeURIComponent(now.key)}`);
  if (slide?.key === now.key) await enter(found, viewer.view());
};

// ---- the address: which slide, and where

const addressOf = (key, view) => {
  const words = new URLSearchParams({ slide: key });
  if (view) {
    for (const name of ["x", "y"]) words.set(name, view[name].toFixed(1));
    words.set("step", view.step.toPrecision(5));
  }
  return `#${words}`;
};

const readAddress = () => {
  const words = new URLSearchParams(location.hash.slice(1));
  const view = { x: Number(words.get("x")), y: Number(words.get("y")), step: Number(words.get("step")) };
  const usable = view.step > 0 && Object.values(view).every(Number.isFinite);
  return { key: words.get("slide"), view: usable ? view : null };
};

const rememberView = () => {
  if (slide && document.body.className === "") history.replaceState(null, "", addressOf(slide.key, viewer.view()));
};

const follow = async () => {
  const { key, view } = readAddress();
  if (key === null) { leave(); return; }
  if (slide?.key === key) { if (view) viewer.go(view); return; }
  let found;
  try {
    found = await fetchJson(`/api/slides/${encodeURIComponent(key)}`);
  } catch (error) {
    leave();
    byId("count").textContent = `${key}: ${error.message}`;
    return;
  }
  if (readAddress().key !== key) return;
  await enter(found, view);
};

const leave = () => {
  slide = null;
  viewer.close();
  document.body.className = "overview";
  document.title = "tissuehint view";
  drawList();
};

const enter = async (found, view) => {
  slide = found;
  slide.painted = chosenClasses();
  document.body.className = "";
  document.title = `${slide.name} – tissuehint view`;
  drawPanel();
  drawList();
  byId("list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  await viewer.open(slide, view);
  drawScale();
  rememberView();
};

const neighbour = (step) => {
  const open = listed().filter((item) => item.state === "done");
  const at = open.findIndex((item) => item.key === slide?.key);
  const next = open[at + step];
  if (next) location.hash = addressOf(next.key);
};

// ---- what is known of the slide

const drawPanel = () => {
  byId("slide-name").textContent = slide.name;
  const um = slide.um_per_px;
  const facts = [
    ["Size", `${whole(slide.width)} × ${whole(slide.height)} px`],
    ["", `${length(slide.width * um)} × ${length(slide.height * um)}`],
    ["Pixel", `${Number(um.toPrecision(4))} µm, map ${Number(slide.map_um_per_px.toPrecision(4))} µm`],
    ["File", slide.file],
    ["Model", slide.model],
    ["Tissue classes", area(slide.tissue_mm2)],
  ];
  byId("facts").replaceChildren(...facts.filter(([, text]) => text).flatMap(([name, text]) =>
    [make("dt", {}, name), make("dd", {}, text)]));
  say(slide.notes.join("\n"));
  byId("classes").replaceChildren(...slide.classes.map(rowOf));
  for (const element of document.querySelectorAll(".qupath")) element.hidden = !(slide.corner.x || slide.corner.y);
  showCursor(null);
};

const rowOf = (one, place) => {
  const key = place < 9 && one.painted ? [make("kbd", { title: `Key ${place + 1}` }, String(place + 1))] : [];
  const box = make("input", { type: "checkbox", id: `class-${one.index}`, checked: !hidden.has(one.name), disabled: !one.painted });
  if (!one.painted) box.checked = false;
  box.addEventListener("change", () => toggle(one.name, box.checked));
  const only = make("button", { type: "button", class: "link only", "aria-label": `Only ${one.name}` }, "only");
  only.addEventListener("click", () => choose((name) => name === one.name));
  const title = make("span", { class: "title", title: one.name }, make("span", {}, one.name), ...key);
  const label = make("label", { for: box.id }, box, colour(make("span", { class: "swatch" }), one.colour), title);
  const shares = one.painted ? [make("span", {}, area(one.mm2)), make("span", {}, percent(one.percent))]
    : [make("span", {}, `${area(one.mm2)}, not painted`)];
  const row = make("li", { "data-index": one.index, class: hidden.has(one.name) || !one.painted ? "off" : "" },
    label, ...(one.painted ? [only] : []), make("span", { class: "area" }, ...shares));
  if (slide.probabilities) {
    const bar = make("span", { class: "track" }, colour(make("span"), one.painted ? one.colour : "#9aa5b5"));
    row.append(make("span", { class: "share" }, bar, make("output", { "aria-label": `Probability of ${one.name}` }, "–")));
  }
  return row;
};

const chosenClasses = () => painted(slide).filter((one) => !hidden.has(one.name)).map((one) => one.index);

const toggle = (name, on) => {
  if (on) hidden.delete(name); else hidden.add(name);
  for (const row of byId("classes").children) {
    const one = slide.classes[Number(row.dataset.index)];
    if (!one.painted) continue;
    row.classList.toggle("off", hidden.has(one.name));
    row.querySelector("input").checked = !hidden.has(one.name);
  }
  viewer.paint(chosenClasses());
};

const choose = (wanted) => {
  const [first, ...others] = painted(slide);
  for (const one of others) if (wanted(one.name)) hidden.delete(one.name); else hidden.add(one.name);
  toggle(first.name, wanted(first.name));
};

const say = (text) => {
  byId("note").textContent = text;
  byId("note").hidden = !text;
};

// ---- scale bar and cursor

const drawScale = () => {
  if (!slide) return;
  const umPerScreenPx = viewer.step() * slide.um_per_px;
  const um = roundLength(150 * umPerScreenPx);
  byId("scale-text").textContent = length(um);
  byId("scale-bar").style.width = `${um / umPerScreenPx}px`;
  byId("magnification").textContent = `${Number((10 / umPerScreenPx).toPrecision(3))}×`;
};

let pointer = null; // where the mouse is over the slide, in window coordinates
let asking = false;
let wanted = false;

const askLater = () => {
  if (!pointer || !slide) return;
  if (asking) { wanted = true; return; }
  ask();
};

const ask = async () => {
  asking = true;
  wanted = false;
  const of = slide;
  const place = viewer.under(pointer.x, pointer.y);
  showPlace(place);
  try {
    const answer = await fetchJson(`/api/slides/${encodeURIComponent(of.key)}/at?x=${place.x}&y=${place.y}`);
    if (slide === of && pointer) showCursor(answer);
  } catch {
    if (slide === of) showCursor(null, "cannot be read");
  }
  asking = false;
  if (wanted) askLater();
};

const showPlace = (place) => {
  byId("cursor-px").textContent = `${whole(place.x)}, ${whole(place.y)} px`;
  byId("cursor-um").textContent = `${whole(place.x * slide.um_per_px)}, ${whole(place.y * slide.um_per_px)} µm`;
  byId("cursor-qupath").textContent = `${whole(place.x - slide.corner.x)}, ${whole(place.y - slide.corner.y)} px`;
};

const showCursor = (answer, otherwise = "–") => {
  byId("cursor-class").textContent = answer ? answer.name ?? "nothing mapped here" : otherwise;
  for (const row of byId("classes").children) {
    const index = Number(row.dataset.index);
    row.classList.toggle("under", answer?.class === index);
    const share = answer?.probabilities?.[index];
    const output = row.querySelector("output");
    if (!output) continue;
    output.textContent = share === undefined ? "–" : `${Math.round(share * 100)} %`;
    row.querySelector(".track span").style.width = share === undefined ? "0" : `${share * 100}%`;
  }
  if (answer || otherwise !== "–") return;
  for (const id of ["cursor-px", "cursor-um", "cursor-qupath"]) byId(id).textContent = "–";
};

// ---- controls

const setShown = (shown) => { byId("shown").checked = shown; viewer.setShown(shown); };

const KEYS = {
  ArrowLeft: () => viewer.pan(-STEP, 0),
  ArrowRight: () => viewer.pan(STEP, 0),
  ArrowUp: () => viewer.pan(0, -STEP),
  ArrowDown: () => viewer.pan(0, STEP),
  "+": () => viewer.zoomBy(ZOOM),
  "=": () => viewer.zoomBy(ZOOM),
  "-": () => viewer.zoomBy(1 / ZOOM),
  "−": () => viewer.zoomBy(1 / ZOOM),
  0: () => viewer.home(),
  o: () => setShown(!byId("shown").checked),
  n: () => neighbour(1),
  p: () => neighbour(-1),
  Escape: () => { location.hash = ""; },
};

const onKey = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !slide || byId("keys").open) return;
  const { target } = event;
  if (target.matches("input[type=search], select")) return;
  if (target.matches("input[type=range]") && event.key.startsWith("Arrow")) return;
  const one = /^[1-9]$/.test(event.key) ? painted(slide)[Number(event.key) - 1] : null;
  if (one) toggle(one.name, hidden.has(one.name));
  else if (Object.hasOwn(KEYS, event.key)) KEYS[event.key]();
  else return;
  event.preventDefault();
};

const fetchJson = async (address) => {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
  return answer.json();
};

addEventListener("keydown", onKey);
addEventListener("hashchange", follow);
byId("filter").addEventListener("input", drawList);
byId("order").addEventListener("change", drawList);
byId("mapped").addEventListener("change", drawList);
byId("shown").addEventListener("change", (event) => setShown(event.target.checked));
byId("opacity").addEventListener("input", (event) => {
  byId("opacity-text").textContent = `${event.target.value} %`;
  viewer.setOpacity(Number(event.target.value) / 100);
});
byId("all").addEventListener("click", () => choose(() => true));
byId("nothing").addEventListener("click", () => choose(() => false));
byId("keys-button").addEventListener("click", () => byId("keys").showModal());
byId("zoom").addEventListener("click", (event) => {
  const kind = event.target.closest("button")?.dataset.zoom;
  if (kind === "in") viewer.zoomBy(ZOOM);
  if (kind === "out") viewer.zoomBy(1 / ZOOM);
  if (kind === "home") viewer.home();
});
byId("stage").addEventListener("pointermove", (event) => {
  pointer = { x: event.clientX, y: event.clientY };
  askLater();
});
byId("stage").addEventListener("pointerleave", () => { pointer = null; showCursor(null); });

await refresh();
setInterval(() => { if (!document.hidden) refresh(); }, ASK_AGAIN);
const finished = slides.filter((item) => item.state === "done");
if (!location.hash && slides.length === 1 && finished.length === 1) history.replaceState(null, "", addressOf(finished[0].key));
await follow();
