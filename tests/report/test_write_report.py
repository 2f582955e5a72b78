from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.report.run_directories import LABELS, RECIPE, build_run, score_row, scores, write_item, write_json
from tissuehint.errors import InputError
from tissuehint.report import write_report
from tissuehint.report.markup import tag
from tissuehint.report.plots import ticks
from tissuehint.report.scores import headline_row

VOID = {"br", "img", "input", "meta"}


class Page(HTMLParser):
    """A strict reader: every element is closed in order; collects elements and visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = source
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def render(run: Path) -> Page:
    target = write_report(run)
    assert target == run / "report.html"
    return Page(target.read_text(encoding="utf-8"))


def change(path: Path, **values: Any) -> None:
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def test_a_whole_run_shows_all_its_parts(run: Path) -> None:
    page = render(run)
    layers = [figure["data-layer"] for figure in page.all("figure") if "data-layer" in figure]
    assert layers == ["image", "truth", "tissue_map", "pseudo_mask", "prediction"] * 2
    assert len(page.all("img")) == 10
    for words in ("phantom-cam", "finished", "patch_000", "Synthetic tissue, no patient data.", "1.0.31", "1 h 2 min"):
        assert words in page.text
    assert "TissueModel.load('phantom-cam-0/model')" in page.text
    assert RECIPE.strip() in page.text
    assert len([figure for figure in page.all("figure") if figure.get("class") == "chart"]) == 4
    assert not [words for words in page.all("p") if words.get("class") == "missing"]


def test_every_score_row_says_split_gate_and_protocol(run: Path) -> None:
    source = render(run).source
    table = source[source.index("All scores") : source.index("</table>")]
    rows = re.findall(r"<tr[^>]*><th[^>]*scope=\"row\".*?</tr>", table)
    written = json.loads((run / "scores.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == len(written)
    letters = {"ignore_white": "A", "fp_on_white": "B"}
    for shown, row in zip(rows, written, strict=True):
        assert f"{letters[row['protocol']]} {row['protocol']}" in shown
        assert f">{row['gate']}<" in shown
        assert f">{row['split']}<" in shown
        assert f"{row['miou']:.3f}" in shown
        assert "band 6 px" in shown or ">6 px<" in shown


def test_the_headline_is_the_deployed_model_and_never_an_oracle(run: Path) -> None:
    rows = [
        score_row("stage1", 0.99, gate="oracle"),
        score_row("ceiling", 0.98, gate="none"),
        score_row("stage1", 0.5),
        score_row("stage2", 0.7, split="val", gate="none"),
        score_row("stage2", 0.6, gate="none"),
    ]
    assert headline_row(rows) is rows[4]
    assert headline_row(rows[:3]) is rows[2]
    assert headline_row(rows[:2]) is None
    page = render(run)
    cards = page.source[page.source.index('class="cards"') : page.source.index('id="scores"')]
    assert "0.660" in cards
    assert "protocol A ignore_white, gate none" in cards
    assert "+0.450" in cards
    assert "0.930" in cards


def test_the_page_asks_the_network_for_nothing(run: Path) -> None:
    page = render(run)
    for name, attributes in page.elements:
        assert name not in {"link", "iframe", "object", "embed", "base", "form"}
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(key) or "#").startswith(("data:image/", "#")), (name, key)
        assert "url(" not in (attributes.get("style") or "")
    assert "http://" not in page.source
    assert "https://" not in page.source
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_one_script_of_the_page_only(run: Path) -> None:
    page = render(run)
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_names_from_user_data_are_escaped(run: Path) -> None:
    evil = "<script>alert('x')</script>\"'&"
    change(run / "environment.json", notes=[evil], command=evil, packages={evil: evil}, **{evil: evil})
    labels = {"names": [evil, "stroma"], "colours": [[1, 2, 3], [4, 5, 6]], "ignore": 255, "white": None}
    row = score_row("stage2", 0.5, name=evil, split=evil, gate=evil, protocol=evil, iou={evil: 0.5})
    write_json(run / "scores.json", {"labels": labels, "rows": [row | {evil: 0.5}], "weak_full_ratio": {evil: evil}})
    (run / "recipe.yaml").write_text(json.dumps({"name": evil, "method": {"name": evil}, "data": {"source": evil}}))
    item = write_item(run / "gallery", evil, 0)
    item["layers"][evil] = item["layers"]["tissue_map"]
    item["split"] = evil
    write_json(run / "gallery" / "index.json", {"items": [item]})
    (run / "stage1" / "metrics.csv").write_text(f'step,"{evil.replace(chr(34), "")}_loss"\n1,0.5\n2,0.4\n')
    page = render(run)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in page.source
    assert page.text.count("<script>alert('x')</script>") > 10
    assert not [name for name, attributes in page.elements if any(key.startswith("on") for key in attributes)]


def test_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: begun\nstage2: {network: unet}\n")
    page = render(tmp_path)
    assert "not finished: stage 1, pseudo masks, stage 2, scores to come" in page.text
    for words in ("There are no scores yet", "no gallery yet", "no model yet", "no record of its environment"):
        assert words in page.text
    assert "No stage has a log" in page.text
    assert not page.all("img")


def test_a_run_without_masks_says_why_nothing_is_scored(run: Path) -> None:
    change(run / "scores.json", rows=[], weak_full_ratio=None)
    page = render(run)
    assert page.text.count("no image of the scored splits has a mask") == 2
    assert "yet" not in page.text


def test_the_band_of_images_that_differ_in_size(run: Path) -> None:
    rows = [{**row, "boundary_distance": "4 to 7"} for row in scores()["rows"]]
    change(run / "scores.json", rows=rows)
    assert "band 4 to 7 px" in render(run).text


def test_image_scores_name_their_protocol(run: Path) -> None:
    """The picture of a prediction may say white, and so does its score."""
    assert "mIoU 0.900, protocol C" in render(run).text
    change(run / "scores.json", labels={**LABELS.to_dict(), "white": None})
    assert "mIoU 0.900, protocol" not in render(run).text


def test_published_numbers_stand_with_the_scores(run: Path) -> None:
    assert "Published" not in render(run).text
    with (run / "recipe.yaml").open("a") as file:
        file.write("published: {OEEM as reported: 76.48 mIoU}\n")
    text = render(run).text
    assert text.index("OEEM as reported") < text.index("IoU by class")


def test_notes_on_the_data_stand_under_the_headline(run: Path) -> None:
    text = render(run).text
    assert text.index("Headline") < text.index("no patient data") < text.index("All scores")


def test_a_one_stage_run_is_finished_without_stage_two(run: Path) -> None:
    (run / "recipe.yaml").write_text("name: one\nmethod: {name: lpd}\nstage2: null\n")
    for name in ("stage2", "pseudo_masks", "ceiling"):
        for file in (run / name).iterdir():
            file.unlink()
        (run / name).rmdir()
    change(run / "scores.json", rows=[score_row("stage1", 0.5)], weak_full_ratio=None)
    page = render(run)
    assert "finished" in page.words
    assert page.text.count("not in this run") == 3
    assert "no ceiling with full masks was trained" in page.text


@pytest.mark.parametrize("part", ["environment.json", "scores.json", "gallery", "stage1", "stage2", "model", "ceiling"])
def test_any_part_may_be_missing(run: Path, part: str) -> None:
    path = run / part
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        file.unlink()
    if path.is_dir():
        path.rmdir()
    render(run)


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"rows": 3}', '{"rows": [3]}', '{"labels": {"names": [1, 1]}}', "\x00"]
)
@pytest.mark.parametrize("part", ["environment.json", "scores.json", "gallery/index.json", "stage1/done.json"])
def test_a_damaged_part_is_named_on_the_page(run: Path, part: str, content: str) -> None:
    (run / part).write_text(content, encoding="utf-8")
    page = render(run)
    if content in ("", "{", "[1]", "\x00") or part == "scores.json":
        assert "Parts that cannot be read" in page.text
        assert part in page.text


def test_null_and_nan_scores_are_no_numbers(run: Path) -> None:
    empty = dict.fromkeys(("fwiou", "dice_mean", "accuracy", "boundary_miou", "boundary_distance", "images"))
    rows = [score_row("stage2", None, **empty), score_row("stage1", math.nan), score_row("stage1", 0.4)]
    write_json(run / "scores.json", {"labels": LABELS.to_dict(), "rows": rows, "weak_full_ratio": {"miou": None}})
    page = render(run)
    assert "n/a" in page.words
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.split()
    cards = page.source[page.source.index('class="cards"') : page.source.index('id="scores"')]
    assert "0.400" in cards


def test_logs_without_values_and_with_infinite_ones(run: Path) -> None:
    (run / "stage1" / "metrics.csv").write_text("")
    (run / "stage2" / "metrics.csv").write_text(
        "epoch,step,train_loss,val_miou\n0,1,nan,\n0,2,inf,\n0,3,0.5,\n0,x,1,\n,,,\n0,4,0.5,0.3\n"
    )
    page = render(run)
    assert "The log is empty: Stage 1." in page.text
    assert "train_loss (2)" in page.text
    lines = [attributes["points"] for attributes in page.all("polyline")]
    assert [len((line or "").split()) for line in lines] == [2, 1]
    assert not any("nan" in (line or "") or "inf" in (line or "") for line in lines)


def test_a_long_log_is_drawn_with_few_points_and_says_so(run: Path) -> None:
    rows = "".join(f"0,{step},{1 / (1 + step)}\n" for step in range(5000))
    (run / "stage1" / "metrics.csv").write_text(f"epoch,step,train_loss\n{rows}")
    page = render(run)
    assert "means of 17 logged values" in page.text
    assert len((page.all("polyline")[0]["points"] or "").split()) <= 300


def test_masks_keep_their_classes_and_large_pictures_shrink(tmp_path: Path) -> None:
    run = build_run(tmp_path / "large", items=1, height=500, width=640)
    page = render(run)
    pictures = {str(image["alt"]).split(" of ")[0]: image for image in page.all("img")}
    assert {image["width"] for image in pictures.values()} == {"320"}
    assert {image["height"] for image in pictures.values()} == {"250"}
    colours = {tuple(colour) for colour in LABELS.colour_table()[[0, 1, 2, 3, 4, 255]].tolist()}
    for layer in ("truth", "pseudo mask (oracle)", "prediction"):
        shown = np.asarray(decode(pictures[layer]["src"]).convert("RGB")).reshape(-1, 3)
        assert {tuple(colour) for colour in np.unique(shown, axis=0).tolist()} <= colours


def test_bare_index_masks_get_the_colours_of_the_label_space(run: Path) -> None:
    Image.fromarray(np.full((8, 8), 1, np.uint8)).save(run / "gallery" / "0_truth.png")
    page = render(run)
    source = next(image["src"] for image in page.all("img") if image["alt"] == "truth of patch_000")
    assert decode(source).convert("RGB").getpixel((0, 0)) == LABELS.colours[1]


def test_metadata_of_pictures_does_not_come_along(run: Path) -> None:
    picture = Image.open(run / "gallery" / "0_image.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x010E] = "JANE DOE"
    picture.save(run / "gallery" / "0_image.jpg", exif=exif)
    image = next(image for image in render(run).all("img") if image["alt"] == "image of patch_000")
    assert b"JANE DOE" not in base64.b64decode(str(image["src"]).split(",")[1])


def test_pictures_that_cannot_be_shown_are_named(run: Path) -> None:
    gallery = run / "gallery"
    (gallery / "0_truth.png").unlink()
    (gallery / "0_prediction.png").write_bytes((gallery / "0_prediction.png").read_bytes()[:60])
    (gallery / "0_tissue_map.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(run / "outside.png")
    items = json.loads((gallery / "index.json").read_text())["items"]
    items[1]["layers"]["explained"] = "../outside.png"
    write_json(gallery / "index.json", {"items": items})
    page = render(run)
    assert "truth (0_truth.png) cannot be shown: no such file" in page.text
    assert "tissue map (stage 1) (0_tissue_map.png) cannot be shown: it is no picture." in page.text
    assert str(run) not in page.source
    assert "prediction (0_prediction.png) cannot be shown" in page.text
    assert "it lies outside the gallery folder" in page.text
    assert len(page.all("img")) == 7


def test_pictures_have_words_and_controls_have_labels(run: Path) -> None:
    page = render(run)
    assert all(image.get("alt") for image in page.all("img"))
    assert all(drawing.get("aria-label") for drawing in page.all("svg"))
    named = {label.get("for") for label in page.all("label")}
    sliders = [control for control in page.all("input") if control["type"] == "range"]
    assert len(sliders) == 2 + 2  # one per image, one for all, one in the enlarged view
    assert {slider["id"] for slider in sliders} <= named
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in identifiers}


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    first, second = build_run(tmp_path / "a" / "run"), build_run(tmp_path / "b" / "run")
    one = write_report(first).read_bytes()
    assert one == write_report(second).read_bytes()
    assert one == write_report(first).read_bytes()


def test_a_folder_that_is_no_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="not a directory"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "recipe.yaml").write_text("a: [")
    with pytest.raises(InputError, match="YAML"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@given(st.text(), st.text())
def test_markup_carries_any_text_unchanged(attribute: str, content: str) -> None:
    # a parser turns carriage returns and NUL into other characters by the rules of HTML, and so would a browser
    clean = str.maketrans("", "", "\r\x00")
    attribute, content = attribute.translate(clean), content.translate(clean)
    page = Page(str(tag("p", content, title=attribute)))
    assert page.elements == [("p", {"title": attribute})]
    assert "".join(page.words) == content


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9), st.booleans())
def test_ticks_hold_the_range_and_are_few(low: float, span: float, whole: bool) -> None:
    marks = ticks(low, low + span, whole=whole)
    assert 2 <= len(marks) <= 12
    tolerance = 1e-6 * (marks[-1] - marks[0])
    assert len(set(marks)) == len(marks)
    assert marks[0] <= low + tolerance
    assert marks[-1] >= low + span - tolerance
    np.testing.assert_allclose(np.diff(marks) / (marks[1] - marks[0]), 1, rtol=1e-3)


def decode(source: str | None) -> Image.Image:
    assert source is not None
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
