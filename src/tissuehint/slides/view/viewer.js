// The slide with the class map over it. Both are pyramids of the same tiles, so that they cannot lie apart.

const MOVES = ["canvas-drag", "canvas-scroll", "canvas-pinch", "canvas-double-click",
  "navigator-click", "navigator-drag", "navigator-scroll"];
const LONGEST_WAIT = 4000; // ms, until a map with other classes is shown though tiles are missing

/** A viewer in an element; `changed` is told when the view rests, `moving` whenever it moves. */
export class SlideViewer {
  constructor(element, { changed, moving, failed }) {
    this.element = element;
    this.opacity = 0.45;
    this.shown = true;
    this.whole = false; // whether the whole slide was asked for last
    this.slide = null;
    this.map = null;
    this.coming = null;
    this.osd = OpenSeadragon({
      element,
      drawer: "canvas", // draws single tiles without smoothing, which class maps need
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "TOP_RIGHT",
      navigatorSizeRatio: 0.17,
      navigatorBackground: "#fff",
      navigatorBorderColor: "#9aa5b5",
      navigatorDisplayRegionColor: "#2f5fb3",
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      animationTime: 0.35,
      springStiffness: 9,
      zoomPerScroll: 1.3,
      visibilityRatio: 0.25,
      minZoomImageRatio: 0.7,
      maxZoomPixelRatio: 4,
      maxImageCacheCount: 500,
      imageLoaderLimit: 6,
      maxTilesPerFrame: 6,
      timeout: 120000,
      autoResize: false, // see #fit
      subPixelRoundingForTransparency: OpenSeadragon.SUBPIXEL_ROUNDING_OCCURRENCES.ALWAYS,
    });
    // the page has its own keys, which work wherever the focus is
    this.osd.addHandler("canvas-key", (event) => { event.preventDefaultAction = true; });
    this.osd.addHandler("tile-drawing", (event) => {
      if (event.tiledImage.ofClasses) event.context.imageSmoothingEnabled = false;
    });
    this.osd.addHandler("tile-load-failed", failed);
    this.osd.addHandler("animation-finish", changed);
    for (const name of ["animation", "open"]) this.osd.addHandler(name, moving);
    new ResizeObserver(() => { if (this.#fit()) { changed(); moving(); } }).observe(element);
    for (const name of MOVES) this.osd.addHandler(name, () => { this.whole = false; });
  }

  /** Show a slide: at a view, or whole. */
  async open(slide, view) {
    this.slide = slide;
    this.map = null;
    this.coming = null;
    this.osd.close();
    const sources = slide.pixels ? [{ tileSource: this.#source("slide", "jpg", "") }] : [];
    const placed = await Promise.all([...sources, this.#mapOptions(slide.painted)].map((options) => this.#add(options)));
    if (this.slide !== slide) { // another one was opened meanwhile
      placed.forEach((item) => this.osd.world.removeItem(item));
      return;
    }
    this.map = placed.at(-1);
    this.#fit();
    this.home(true);
    if (view) this.go(view, true);
    this.#applyOpacity();
  }

  close() {
    this.slide = null;
    this.map = null;
    this.osd.close();
  }

  /** Paint these classes only: their tiles are fetched behind the map, which gives way when they are there. */
  async paint(classes) {
    const { slide } = this;
    if (!slide) return;
    slide.painted = classes;
    const turn = (this.coming = {});
    this.#tellBusy();
    const next = await this.#add(this.#mapOptions(classes));
    await this.#loaded(next);
    if (this.coming !== turn || this.slide !== slide) {
      this.osd.world.removeItem(next);
      return;
    }
    const before = this.map;
    this.map = next;
    this.coming = null;
    this.#applyOpacity();
    if (before) this.osd.world.removeItem(before);
    this.#tellBusy();
  }

  setOpacity(opacity) { this.opacity = opacity; this.#applyOpacity(); }
  setShown(shown) { this.shown = shown; this.#applyOpacity(); }

  /** Centre in level-0 pixels, and how many of them a screen pixel shows. */
  view() {
    const centre = this.#toSlide(this.osd.viewport.getCenter(false));
    return { x: centre.x, y: centre.y, step: this.step(false) };
  }

  go({ x, y, step }, immediately = false) {
    this.whole = false;
    const { viewport } = this.osd;
    const width = (step * viewport.getContainerSize().x) / this.slide.width;
    viewport.panTo(this.#toViewport(x, y), immediately);
    viewport.zoomTo(1 / width, null, immediately);
    viewport.applyConstraints(immediately);
  }

  /** Level-0 pixels a screen pixel. */
  step(current = true) {
    const { viewport } = this.osd;
    return this.slide.width / (viewport.getZoom(current) * viewport.getContainerSize().x);
  }

  /** Level-0 pixels at a place of the window. */
  under(clientX, clientY) {
    const frame = this.osd.container.getBoundingClientRect();
    const point = new OpenSeadragon.Point(clientX - frame.left, clientY - frame.top);
    return this.#toSlide(this.osd.viewport.pointFromPixel(point, true));
  }

  zoomBy(factor) {
    this.whole = false;
    this.osd.viewport.zoomBy(factor);
    this.osd.viewport.applyConstraints();
  }

  /** The whole slide; it stays whole when the window changes. */
  home(immediately = false) {
    this.whole = true;
    this.osd.viewport.goHome(immediately);
  }

  /** Move by a share of what is seen. */
  pan(right, down) {
    this.whole = false;
    const seen = this.osd.viewport.getBounds(false);
    this.osd.viewport.panBy(new OpenSeadragon.Point(right * seen.width, down * seen.height));
    this.osd.viewport.applyConstraints();
  }

  /** Take the size of the element: the whole slide stays whole, another view keeps its centre and magnification. */
  #fit() {
    const { container, viewport } = this.osd;
    const size = new OpenSeadragon.Point(container.clientWidth, container.clientHeight);
    if (!size.x || !size.y || size.equals(viewport.getContainerSize())) return false;
    const view = this.map ? this.view() : null;
    viewport.resize(size, false);
    if (view && this.whole) this.home(true);
    else if (view) this.go(view, true);
    this.osd.forceRedraw();
    return true;
  }

  // the slide is one unit wide in the viewer's own coordinates
  #toSlide(point) { return { x: point.x * this.slide.width, y: point.y * this.slide.width }; }
  #toViewport(x, y) { return new OpenSeadragon.Point(x / this.slide.width, y / this.slide.width); }

  #source(layer, ending, query) {
    const { key, version, width, height, tile, first_level: minLevel, last_level: maxLevel } = this.slide;
    const base = `/slides/${encodeURIComponent(key)}/${layer}`;
    return {
      width, height, minLevel, maxLevel,
      tileSize: tile,
      tileOverlap: 0,
      getTileUrl: (level, x, y) => `${base}/${level}/${x}_${y}.${ending}?v=${version}${query}`,
      hasTransparency: () => ending === "png",
    };
  }

  #mapOptions(classes) {
    const tileSource = this.#source("classes", "png", `&classes=${classes.join(",")}`);
    return { tileSource, opacity: 0, preload: true, ofClasses: true };
  }

  #add(options) {
    return new Promise((resolve, reject) => {
      this.osd.addTiledImage({
        ...options,
        x: 0, y: 0, width: 1,
        success: ({ item }) => {
          item.ofClasses = Boolean(options.ofClasses);
          item.addHandler("fully-loaded-change", () => this.#tellBusy());
          resolve(item);
        },
        error: reject,
      });
    });
  }

  #applyOpacity() { this.map?.setOpacity(this.shown ? this.opacity : 0); }

  /** Say whether tiles are still missing. */
  #tellBusy() {
    const { world } = this.osd;
    const items = Array.from({ length: world.getItemCount() }, (_, index) => world.getItemAt(index));
    const busy = this.coming !== null || items.some((item) => !item.getFullyLoaded());
    this.element.setAttribute("aria-busy", String(busy));
  }

  #loaded(item) {
    if (item.getFullyLoaded()) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, LONGEST_WAIT);
      item.addHandler("fully-loaded-change", (event) => {
        if (!event.fullyLoaded) return;
        clearTimeout(timer);
        resolve();
      });
    });
  }
}
