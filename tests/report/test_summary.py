"""``summary.html`` of a cohort, opened as a file in headless Chromium: filter, order, dark page, pictures."""

from __future__ import annotations

import json

import pytest

from tests.browser import chromium, needs_chromium
from tests.slides.view.predicted import STROMA, TUMOUR, marked_map, write_map, write_slide
from tissuehint.errors import InputError
from tissuehint.report import write_summary

STRANGE = "Case 7 & <b>100% #1?"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three finished slides with different shares of tumour, and one that failed."""
    folder = tmp_path_factory.mktemp("summary") / "maps"
    slide = write_slide(folder.parent / "slides" / "one.png")
    for name, tumour in (("alpha", 20), ("beta", 80), (STRANGE, 50)):
        classes = marked_map()
        classes[:] = STROMA
        classes[:, : 3 * tumour] = TUMOUR
        write_map(
            folder / name,
            slide,
            classes=classes,
            tissue_mm2=tumour / 10,
            areas=[
                {"class": "tumour", "pixels": 1, "mm2": 1.0, "percent_of_tissue": float(tumour)},
                {"class": "stroma", "pixels": 1, "mm2": 1.0, "percent_of_tissue": 100.0 - tumour},
            ],
            outputs=["overlay.jpg"],
        )
    bad = folder / "gamma"
    bad.mkdir()
    failed = {"format": 1, "name": "gamma", "state": "failed", "error": "gamma.svs: <i>is truncated</i>; copy it again"}
    (bad / "slide.json").write_text(json.dumps(failed))
    write_summary(folder)
    return folder


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        write_summary(tmp_path / "nothing")


def test_text_is_escaped_and_nothing_is_loaded_from_elsewhere(cohort):
    page = (cohort / "summary.html").read_text()
    assert "<b>100%" not in page
    assert "<i>is truncated" not in page
    assert "3 done, 1 failed" in page
    for scheme in ("http:", "https:"):
        assert f'src="{scheme}' not in page
        assert f'href="{scheme}' not in page


@pytest.fixture(scope="module")
def page(cohort):
    """The page; at the end no error and no request to another place may have happened."""
    with chromium() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        problems, asked = [], []
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((cohort / "summary.html").as_uri())
        yield page
        assert problems == []
        assert all(url.startswith((cohort.as_uri(), "data:")) for url in asked)


@needs_chromium
class TestInTheBrowser:
    def names(self, page):
        return [card.locator("h3").inner_text() for card in page.locator("article.slide:visible").all()]

    def test_every_picture_is_there(self, page):
        page.locator("article.slide img").last.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
        widths = page.evaluate("[...document.querySelectorAll('article.slide img')].map((one) => one.naturalWidth)")
        assert len(widths) == 3
        assert all(width > 0 for width in widths)

    def test_filter_by_name_and_state(self, page):
        assert sorted(self.names(page)) == sorted(["alpha", "beta", STRANGE, "gamma"])
        page.fill("#filter", "CASE 7")
        assert self.names(page) == [STRANGE]
        page.fill("#filter", "nobody")
        assert self.names(page) == []
        assert page.locator("#nothing").is_visible()
        page.fill("#filter", "")
        page.select_option("#state", "failed")
        assert self.names(page) == ["gamma"]
        assert "is truncated" in page.locator("article.slide:visible .warning").inner_text()
        page.select_option("#state", "")
        assert len(self.names(page)) == 4
        assert not page.locator("#nothing").is_visible()

    def test_order_by_the_share_of_a_class(self, page):
        page.select_option("#order", "tumour %")
        assert self.names(page)[:3] == ["beta", STRANGE, "alpha"]
        page.select_option("#order", "stroma %")
        assert self.names(page)[:3] == ["alpha", STRANGE, "beta"]
        page.select_option("#order", "name")
        assert self.names(page) == sorted(self.names(page), key=str.lower)

    def test_the_table_sorts_by_a_column(self, page):
        def column():
            return [row.locator("th").inner_text() for row in page.locator("table.sortable tbody tr").all()]

        head = page.locator("table.sortable thead th", has_text="tumour, %").locator("button")
        head.click()
        assert column() == ["beta", STRANGE, "alpha", "gamma"]
        head.click()
        assert column() == ["alpha", STRANGE, "beta", "gamma"]  # a slide without a number stays last

    def test_dark_page(self, page):
        def ground():
            return page.evaluate("getComputedStyle(document.body).backgroundColor")

        before = ground()
        page.click("#theme")
        assert ground() != before
        page.click("#theme")
        assert ground() == before
