"""Pictures that a method left before training, on the page of a run."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.run_directories import write_json
from tests.report.test_write_report import Page, render

COLOURS = ((200, 30, 90), (20, 120, 60))
SECRET = (7, 60, 250)  # of pictures that lie outside


def figures(page: Page) -> list[dict[str, str | None]]:
    """The pictures of the section."""
    source = section(page)
    return [] if source is None else Page(source).all("img")


def section(page: Page) -> str | None:
    start = page.source.find('id="prepared"')
    if start < 0:
        return None
    start = page.source.rindex("<section", 0, start)
    return page.source[start : page.source.index("</section>", start) + len("</section>")]


def colour(uri: str) -> np.ndarray:
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
    return np.asarray(picture.convert("RGB")).reshape(-1, 3).mean(0)


def write_pictures(run: Path, **changes: object) -> Path:
    folder = run / "stage1" / "prepared"
    folder.mkdir(parents=True, exist_ok=True)
    for number, shade in enumerate(COLOURS):
        Image.new("RGB", (80 + 8 * number, 40), shade).save(folder / f"bank_{number}.png")
    pictures = [{"file": f"bank_{number}.png", "caption": f"class {number}: 7 patches"} for number in range(2)]
    write_json(
        folder / "pictures.json",
        {"title": "Image bank", "text": "One row a sub-class.", "pictures": pictures} | changes,
    )
    return folder


def test_without_pictures_there_is_no_section(run: Path) -> None:
    page = render(run)
    assert section(page) is None
    assert "#prepared" not in page.source
    (run / "stage1" / "prepared").mkdir(parents=True)
    assert section(render(run)) is None


def test_pictures_stand_with_title_text_and_captions(run: Path) -> None:
    before = len(render(run).all("img"))
    write_pictures(run)
    page = render(run)
    inside = Page(section(page) or "")
    for words in ("Image bank", "One row a sub-class.", "class 0: 7 patches", "class 1: 7 patches"):
        assert words in inside.text
    assert {"href": "#prepared"} in page.all("a")
    assert len(page.all("img")) == before + 2
    shown = figures(page)
    assert [image["alt"] for image in shown] == ["class 0: 7 patches", "class 1: 7 patches"]
    assert [(image["width"], image["height"]) for image in shown] == [("80", "40"), ("88", "40")]
    for image, shade in zip(shown, COLOURS, strict=True):
        assert str(image["src"]).startswith("data:image/")
        np.testing.assert_allclose(colour(str(image["src"])), shade, atol=4)
    assert not [words for words in inside.all("p") if words.get("class") == "missing"]
    assert "bank_0.png" not in page.source


def test_a_large_picture_is_made_smaller(run: Path) -> None:
    Image.new("RGB", (3000, 500), COLOURS[0]).save(write_pictures(run) / "bank_0.png")
    first = figures(render(run))[0]
    assert (first["width"], first["height"]) == ("920", "153")


def test_what_is_written_is_escaped(run: Path) -> None:
    evil = '</p><script>alert("1")</script><img src=x onerror=alert(2)>'
    pictures = [{"file": "bank_0.png", "caption": evil}, {"file": f"{evil}.png", "caption": '" onload="alert(3)'}]
    write_pictures(run, title=evil, text=evil, pictures=pictures)
    page = render(run)
    assert len(page.all("script")) == 1
    assert not [names for _, names in page.elements if {"onerror", "onload"} & names.keys()]
    assert [image["alt"] for image in figures(page)] == [evil]
    assert evil in page.text


@pytest.mark.parametrize("written", ["{", "", '{"title": ', "\x00"])
def test_an_index_that_is_no_json_is_named(run: Path, written: str) -> None:
    (write_pictures(run) / "pictures.json").write_text(written, encoding="utf-8")
    page = render(run)
    assert "stage1/prepared/pictures.json cannot be read" in page.text
    assert section(page) is None


@pytest.mark.parametrize("written", [[], [{"file": "bank_0.png"}], "bank_0.png", 3])
def test_an_index_that_is_no_object_is_named(run: Path, written: object) -> None:
    write_json(write_pictures(run) / "pictures.json", written)
    page = render(run)
    assert "stage1/prepared/pictures.json is not a JSON object" in page.text
    assert section(page) is None


def test_null_is_as_if_it_were_not_there(run: Path) -> None:
    write_json(write_pictures(run) / "pictures.json", None)
    assert section(render(run)) is None


@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "text", "folder"])
def test_a_picture_that_cannot_be_read_is_named(run: Path, damage: str) -> None:
    path = write_pictures(run) / "bank_0.png"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"empty": b"", "cut": content[:50], "text": b"not a picture"}[damage])
    page = render(run)
    inside = Page(section(page) or "")
    assert "The picture bank_0.png cannot be read. class 0: 7 patches" in inside.text
    assert [image["alt"] for image in figures(page)] == ["class 1: 7 patches"]
    assert "finished" in page.text


OUTSIDE = [
    "../x.png",
    "../../x.png",
    "../../../x.png",
    "..\\..\\x.png",
    "sub/x.png",
    "./../x.png",
    "..",
    ".",
    "",
    None,
    ["x.png"],
    7,
    "bank_0.png\x00",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=str)
def test_no_file_from_elsewhere_is_shown(run: Path, name: object) -> None:
    folder = write_pictures(
        run, pictures=[{"file": name, "caption": "stolen"}, {"file": "bank_1.png", "caption": "own"}]
    )
    (folder / "sub").mkdir()
    for place in (folder / "sub", folder.parent, run, run.parent):
        Image.new("RGB", (40, 40), SECRET).save(place / "x.png")
    page = render(run)
    assert [image["alt"] for image in figures(page)] == ["own"]
    assert "cannot be read. stolen" in page.text
    for image in page.all("img"):
        assert np.abs(colour(str(image["src"])) - SECRET).max() > 20


def test_no_absolute_path_is_shown(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    Image.new("RGB", (40, 40), SECRET).save(outside)
    write_pictures(run, pictures=[{"file": str(outside), "caption": "stolen"}])
    page = render(run)
    assert not figures(page)
    assert "cannot be read. stolen" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"pictures": None},
        {"pictures": []},
        {"pictures": [None, 3, "bank_0.png", ["bank_0.png"]]},
        {"pictures": {"file": "bank_0.png"}},
        {"pictures": "bank_0.png"},
        {"pictures": 3},
        {"title": None},
        {"title": ["a", {"b": 1}]},
        {"title": 3},
        {"text": None},
        {"text": {"a": "<b>"}},
        {"text": [1, 2]},
        {"pictures": [{"file": "bank_0.png"}, {"file": "bank_1.png", "caption": {"a": 1}}]},
        {"pictures": [{}]},
        {"more": {"deep": [1]}},
    ],
    ids=str,
)
def test_other_values_never_break_the_page(run: Path, changes: dict[str, object]) -> None:
    write_pictures(run, **changes)
    page = render(run)
    assert section(page) is not None
    assert "finished" in page.text


def test_an_index_without_anything(run: Path) -> None:
    folder = write_pictures(run)
    write_json(folder / "pictures.json", {})
    page = render(run)
    assert "Prepared" in Page(section(page) or "").text
    assert not figures(page)


@pytest.mark.parametrize("entry", [None, 7, "bank_0.png", ["bank_0.png"]])
def test_an_entry_that_is_no_picture_is_not_passed_over(run: Path, entry: object) -> None:
    write_pictures(run, pictures=[entry, {"file": "bank_1.png", "caption": "second"}])
    page = render(run)
    assert len(figures(page)) == 1
    found = section(page)
    assert found is not None
    assert "cannot be read" in found


def test_what_was_learned_has_a_section_of_its_own(run: Path) -> None:
    write_pictures(run)
    folder = run / "stage1" / "illustrated"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 40), (5, 200, 5)).save(folder / "prototypes_0.png")
    told = {"title": "Prototypes", "text": "Where they look.", "pictures": [{"file": "prototypes_0.png"}]}
    write_json(folder / "pictures.json", told)
    source = render(run).source
    first, second = source.index('id="prepared"'), source.index('id="illustrated"')
    assert first < second
    assert 'href="#illustrated"' in source
    assert "Where they look." in source[second:]
    shown = Page(source[second : source.index("</section>", second)]).all("img")
    assert len(shown) == 1
    np.testing.assert_allclose(colour(str(shown[0]["src"])), (5, 200, 5), atol=6)
