"""The page in headless Chromium: clicks, keys, what is drawn, and that nothing is asked of another computer."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

import numpy as np
import pytest

from tests.browser import chromium, needs_chromium
from tests.slides.view.predicted import (
    GROUND,
    HEIGHT,
    LABELS,
    MARK,
    PLACEMENT,
    SQUARE,
    STROMA,
    TUMOUR,
    WIDTH,
    marked_map,
    running,
    shares_of,
    write_map,
    write_slide,
)

pytestmark = needs_chromium

NAME = "case 7 (left) & <b>100% #1?"
OPACITY = 0.45  # at the start

# colours of the drawn canvas at places of the slide, (x, y) level-0 px
COLOURS = """async (places) => {
  const frame = document.getElementById("viewer").getBoundingClientRect();
  const words = new URLSearchParams(location.hash.slice(1));
  const [x, y, step] = ["x", "y", "step"].map((name) => Number(words.get(name)));
  const canvas = document.querySelector("#viewer .openseadragon-canvas canvas");
  const ratio = canvas.width / frame.width;
  return places.map(([px, py]) => {
    const across = (px - x) / step + frame.width / 2, down = (py - y) / step + frame.height / 2;
    return [...canvas.getContext("2d").getImageData(across * ratio, down * ratio, 1, 1).data.slice(0, 3)];
  });
}"""
INSIDE = (SQUARE["left"] + SQUARE["width"] / 2, SQUARE["top"] + SQUARE["height"] / 2)
ABOVE = (INSIDE[0], 160.0)  # stroma
BESIDE = (INSIDE[0], 20.0)  # slide without a map


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    slide = write_slide(folder / "slides" / "case7.png")
    write_map(folder / "maps" / NAME, slide, probabilities=shares_of(marked_map()))
    other = write_map(folder / "maps" / "plain", slide)
    record = json.loads((other / "slide.json").read_text())
    record["slide"]["path"] = "/elsewhere/gone.svs"
    record["slide"]["bounds"] = [32, 64, 600, 900]
    (other / "slide.json").write_text(json.dumps(record))
    (folder / "maps" / "bad").mkdir()
    failed = {"format": 1, "name": "bad", "state": "failed", "error": "bad.svs: <i>is truncated</i>; copy it again"}
    (folder / "maps" / "bad" / "slide.json").write_text(json.dumps(failed))
    with running(folder / "maps", folder / "slides") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(server, browser):
    """A fresh page; at the end no error and no request to another place may have happened."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(15000)
    problems, asked = [], []
    page.on("console", lambda message: message.type == "error" and problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector(".slide")
    yield page
    context.close()
    assert problems == []
    assert any("/classes/" in url for url in asked) or page.slides_closed  # the page did work
    assert {urlsplit(url).netloc for url in asked} == {f"127.0.0.1:{server.port}"}


def open_slide(page, key: str) -> None:
    page.slides_closed = False
    page.locator(f'a.slide[data-key="{key}"]').click()
    until(page, "location.hash.includes('step=')")
    settle(page)


def until(page, script: str) -> None:
    """Wait until a script is true; the page's own policy forbids what playwright offers for that."""
    for _ in range(150):
        if page.evaluate(script):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {script}")


def settle(page) -> None:
    """Until all tiles are there and the canvas has not changed for a while."""
    script = """() => document.getElementById("viewer").getAttribute("aria-busy") === "false" &&
      document.querySelector("#viewer .openseadragon-canvas canvas").toDataURL()"""
    last, same = None, 0
    for _ in range(100):
        page.wait_for_timeout(100)
        now = page.evaluate(script)
        same = same + 1 if now and now == last else 0
        last = now
        if same >= 3:
            return
    raise AssertionError("the canvas does not come to rest")


def colours(page, *places) -> np.ndarray:
    return np.array(page.evaluate(COLOURS, [list(place) for place in places]), float)


def over(ground, index, opacity=OPACITY) -> np.ndarray:
    """A class colour laid over the slide."""
    return (1 - opacity) * np.array(ground) + opacity * np.array(LABELS.colours[index])


def test_list_shows_states_and_filters(page):
    page.slides_closed = True
    assert page.locator(".slide .name").all_inner_texts() == ["bad", NAME, "plain"]
    assert page.locator("#count").inner_text() == "3 slides · 1 failed"
    bad = page.locator(".slide.failed")
    assert "<i>is truncated</i>; copy it again" in bad.inner_text()  # text of the data is never markup
    assert page.locator("a.slide").count() == 2
    card = page.locator(f'a.slide[data-key="{NAME}"]')
    assert "mm² tissue" in card.inner_text()
    assert "tumour" in card.locator(".bar").get_attribute("aria-label")
    until(page, "[...document.images].filter((one) => one.complete && one.naturalWidth).length === 2")
    page.get_by_label("Filter").fill("FAILED")
    assert page.locator(".slide .name").all_inner_texts() == ["bad"]
    page.get_by_label("Filter").fill("tumour case")
    assert page.locator(".slide .name").all_inner_texts() == [NAME]
    page.get_by_label("Filter").fill("nobody")
    assert page.get_by_text("No slide fits the filter.").is_visible()


def test_map_lies_exactly_over_the_slide(page):
    open_slide(page, NAME)
    inside, above, beside = colours(page, INSIDE, ABOVE, BESIDE)
    np.testing.assert_allclose(inside, over(MARK, TUMOUR), atol=6)
    np.testing.assert_allclose(above, over(GROUND, STROMA), atol=6)
    np.testing.assert_allclose(beside, GROUND, atol=6)
    # at a zoom where a map pixel is many screen pixels: both edges of the square within a screen pixel
    page.evaluate("location.hash = `${location.hash.split('&x=')[0]}&x=512&y=256&step=0.5`")
    settle(page)
    corner = [(512 + dx, 256 + dy) for dx, dy in ((1.5, 1.5), (-1.5, 1.5), (1.5, -1.5), (-1.5, -1.5))]
    within, *around = colours(page, *corner)
    np.testing.assert_allclose(within, over(MARK, TUMOUR), atol=12)
    for one in around:
        np.testing.assert_allclose(one, over(GROUND, STROMA), atol=12)


@pytest.mark.parametrize("step", [0.25, 0.5])  # one tile in view, or several, which the viewer draws in another way
def test_classes_never_mix_at_their_borders(page, step):
    """A mixture of two class colours could be the colour of a third."""
    open_slide(page, NAME)
    page.get_by_label("Opacity").fill("100")
    page.evaluate(f"location.hash = `${{location.hash.split('&x=')[0]}}&x=640&y=384&step={step}`")
    settle(page)
    across = colours(page, *((640, 384 + offset / 8) for offset in range(-16, 17)))  # in the middle of a tile
    for colour in across:
        assert min(np.abs(colour - LABELS.colours[index]).max() for index in (TUMOUR, STROMA)) <= 2
    assert len(np.unique(across, axis=0)) == 2


def test_classes_are_switched_by_mouse_and_keys(page):
    open_slide(page, NAME)
    page.get_by_role("checkbox", name="tumour").uncheck()
    settle(page)
    inside, above = colours(page, INSIDE, ABOVE)
    np.testing.assert_allclose(inside, MARK, atol=6)
    np.testing.assert_allclose(above, over(GROUND, STROMA), atol=6)
    page.keyboard.press("1")
    page.keyboard.press("2")
    settle(page)
    inside, above = colours(page, INSIDE, ABOVE)
    np.testing.assert_allclose(inside, over(MARK, TUMOUR), atol=6)
    np.testing.assert_allclose(above, GROUND, atol=6)
    page.get_by_role("button", name="none").click()
    settle(page)
    np.testing.assert_allclose(colours(page, INSIDE)[0], MARK, atol=6)
    page.get_by_role("button", name="Only stroma").click()
    settle(page)
    np.testing.assert_allclose(colours(page, INSIDE, ABOVE), [MARK, over(GROUND, STROMA)], atol=6)
    page.get_by_role("button", name="all").click()
    settle(page)
    np.testing.assert_allclose(colours(page, INSIDE)[0], over(MARK, TUMOUR), atol=6)
    assert page.get_by_role("checkbox", name="white").is_disabled()


def test_opacity_and_switching_off(page):
    open_slide(page, NAME)
    slider = page.get_by_label("Opacity")
    for value in (100, 20):
        slider.fill(str(value))
        settle(page)
        np.testing.assert_allclose(colours(page, INSIDE)[0], over(MARK, TUMOUR, value / 100), atol=6)
        assert page.locator("#opacity-text").inner_text() == f"{value} %"
    page.keyboard.press("o")
    settle(page)
    np.testing.assert_allclose(colours(page, INSIDE)[0], MARK, atol=6)
    assert not page.get_by_label("Show").is_checked()
    page.keyboard.press("o")
    settle(page)
    np.testing.assert_allclose(colours(page, INSIDE)[0], over(MARK, TUMOUR, 0.2), atol=6)


def test_probabilities_and_place_under_the_cursor(page):
    open_slide(page, NAME)
    frame = page.locator("#viewer").bounding_box()
    page.mouse.move(frame["x"] + 300, frame["y"] + 330)
    until(page, "document.getElementById('cursor-class').textContent !== '–'")
    page.wait_for_timeout(300)
    view = {name: float(value) for name, value in page.evaluate("[...new URLSearchParams(location.hash)].slice(1)")}
    x = view["x"] + (300 - frame["width"] / 2) * view["step"]
    y = view["y"] + (330 - frame["height"] / 2) * view["step"]
    classes = marked_map()
    row, column = (int(place) for place in PLACEMENT.to_map(y, x))
    assert page.locator("#cursor-class").inner_text() == LABELS.names[classes[row, column]]
    shown = page.locator("#classes output").all_inner_texts()
    expected = shares_of(classes)[:, row, column] / 255
    assert shown == [f"{round(100 * share)} %" for share in expected]
    assert page.locator("#cursor-px").inner_text().replace("\u202f", "") == f"{int(x)}, {int(y)} px"
    assert page.locator("#cursor-um").inner_text().replace("\u202f", "") == f"{int(x / 2)}, {int(y / 2)} µm"
    page.mouse.move(5, 5)
    until(page, "document.getElementById('cursor-px').textContent === '–'")


def test_keys_move_and_zoom_and_the_scale_follows(page):
    open_slide(page, NAME)

    def view():
        settle(page)
        pairs = page.evaluate("[...new URLSearchParams(location.hash.slice(1))].slice(1)")
        return {name: float(value) for name, value in pairs}

    def bar():
        """um per screen px, as the scale bar says."""
        text = page.locator("#scale-text").inner_text()
        assert text.endswith("µm")
        return float(text.split()[0]) / page.evaluate(
            "parseFloat(getComputedStyle(document.getElementById('scale-bar')).width)"
        )

    start = view()
    assert start["step"] * 0.5 == pytest.approx(bar(), rel=0.01)
    for _ in range(3):
        page.keyboard.press("+")
    near = view()
    assert near["step"] == pytest.approx(start["step"] / 1.5**3, rel=0.01)
    assert near["step"] * 0.5 == pytest.approx(bar(), rel=0.01)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    moved = view()
    assert moved["x"] > near["x"] + 10
    assert moved["y"] > near["y"] + 10
    page.get_by_role("button", name="Zoom out").click()
    assert view()["step"] == pytest.approx(near["step"] * 1.5, rel=0.01)
    page.keyboard.press("0")
    assert view() == pytest.approx(start, rel=0.01)


def test_address_leads_back_to_the_view(page, server):
    open_slide(page, NAME)
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    settle(page)
    address = page.url
    before = colours(page, INSIDE)
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector(".openseadragon-canvas canvas")
    page.wait_for_timeout(500)
    settle(page)
    pairs = [dict(part.split("=") for part in url.split("&")[1:]) for url in (address, page.url)]
    for name in ("x", "y", "step"):
        assert float(pairs[0][name]) == pytest.approx(float(pairs[1][name]), rel=0.01)
    np.testing.assert_allclose(colours(page, INSIDE), before, atol=6)
    page.keyboard.press("Escape")
    page.wait_for_selector("main", state="hidden")
    page.go_back()
    page.wait_for_selector("main", state="visible")


def test_next_slide_and_a_thumbnail_in_its_place(page):
    open_slide(page, NAME)
    page.keyboard.press("n")
    until(page, "document.getElementById('slide-name').textContent === 'plain'")
    until(page, "location.hash.includes('step=')")
    settle(page)
    note = page.locator("#note").inner_text()
    assert "thumbnail" in note
    assert "--slides" in note
    np.testing.assert_allclose(colours(page, INSIDE)[0], over(MARK, TUMOUR), atol=8)
    frame = page.locator("#viewer").bounding_box()
    page.mouse.move(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
    until(page, "document.getElementById('cursor-class').textContent !== '–'")
    x, y = (int(part) for part in page.locator("#cursor-px").inner_text().replace("\u202f", "")[:-3].split(","))
    qupath = page.locator("#cursor-qupath").inner_text().replace("\u202f", "")[:-3].split(",")
    assert [int(part) for part in qupath] == [x - 64, y - 32]


def test_new_results_are_shown_at_the_same_place(browser, tmp_path):
    """The clock of the page is moved on: it asks every few seconds."""
    slide = write_slide(tmp_path / "slides" / "case7.png")
    folder = write_map(tmp_path / "maps" / "one", slide)
    write_map(tmp_path / "maps" / "two", slide)
    with running(tmp_path / "maps", tmp_path / "slides") as server:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        page = context.new_page()
        page.clock.install()
        page.goto(server.url)
        page.locator("a.slide").first.wait_for()
        open_slide(page, "one")
        page.keyboard.press("+")
        settle(page)
        np.testing.assert_allclose(colours(page, INSIDE)[0], over(MARK, TUMOUR), atol=6)
        address = page.url
        classes = marked_map()
        classes[classes == TUMOUR] = STROMA
        again = write_map(tmp_path / "again" / "one", slide, classes=classes)
        for name in ("classes.ome.tif", "areas.csv", "slide.json"):
            (again / name).replace(folder / name)
        page.clock.run_for(12000)
        until(page, "document.querySelector('#classes .area').textContent.startsWith('0.000')")
        settle(page)
        np.testing.assert_allclose(colours(page, INSIDE)[0], over(MARK, STROMA), atol=6)
        assert page.url == address
        context.close()


def test_picture_is_not_blank_and_fits_after_resizing(page, tmp_path):
    open_slide(page, NAME)
    from PIL import Image

    for size in ((1280, 800), (900, 700)):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        settle(page)
        page.screenshot(path=tmp_path / "page.png")
        shown = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
        assert shown.shape == (size[1], size[0], 3)
        frame = {name: int(value) for name, value in page.locator("#viewer").bounding_box().items()}
        part = shown[frame["y"] : frame["y"] + frame["height"], frame["x"] : frame["x"] + frame["width"]].astype(int)
        for colour in (over(MARK, TUMOUR), over(GROUND, STROMA)):
            assert (np.abs(part - colour).max(-1) < 8).mean() > 0.02
        corners = colours(page, (5, 5), (WIDTH - 5, HEIGHT - 5), (5, HEIGHT - 5))
        np.testing.assert_allclose(corners, [GROUND] * 3, atol=8)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
