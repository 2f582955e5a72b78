import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tissuehint.data.folder import read_folder, weaken, write_folder
from tissuehint.data.folder_check import check_folder
from tissuehint.data.records import Record, TissueDataset
from tissuehint.data.weak import proportions_from_mask, read_point_table, read_proportion_table, read_tag_table
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points, Proportions, Tags

HEIGHT, WIDTH = 12, 16
SPACE = LabelSpace(("gland", "stroma", "white"), white=2)
TABLE = """image,split,group,tag:gland,tag:stroma,proportion:gland,proportion:stroma,um_per_px
a.png,train,p1,1,1,0.5,0.5,0.5
b,valid,p2,1,1,0.25,0.75,
sub/c.png,test,p3,1,1,0.5,0.5,
"""
POINTS = "image,row,column,class\na,1,2,gland\na,1,15,stroma\nb.png,0,0,0\n"


def picture(path: Path, height: int = HEIGHT, width: int = WIDTH) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (height, width, 3))
    Image.fromarray(noise.astype(np.uint8)).save(path)


def mask(path: Path, values: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.zeros((HEIGHT, WIDTH))
        values[:, WIDTH // 2 :] = 1
    Image.fromarray(values.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder without problems: three images, all hints, masks."""
    root = tmp_path / "mine"
    for name in ("a", "b", "sub/c"):
        picture(root / f"images/{name}.png")
        mask(root / f"masks/{name}.png")
    (root / "labels.csv").write_text(TABLE)
    (root / "points.csv").write_text(POINTS)
    (root / "classes.json").write_text(json.dumps(SPACE.to_dict()))
    return root


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def told(folder: Path) -> list[str]:
    return [str(problem) for problem in check_folder(folder)]


def test_good_folder_is_read_and_has_no_problem(folder):
    assert told(folder) == []
    dataset = read_folder(folder)
    assert dataset.name == "mine"
    assert dataset.labels == SPACE
    (a,), (b,), (c,) = (dataset.splits[split] for split in ("train", "val", "test"))
    assert (a.id, b.id, c.id) == ("a", "b", "sub__c")
    assert (a.group, a.um_per_px, b.um_per_px) == ("p1", 0.5, None)
    assert a.tags.values.tolist() == [1, 1]
    assert b.proportions.values.tolist() == [0.25, 0.75]
    assert a.points.rows.tolist() == [[1, 2, 0], [1, 15, 1]]
    assert b.points.rows.tolist() == [[0, 0, 0]]
    assert c.points is None
    assert c.read_image().shape == (HEIGHT, WIDTH, 3)
    assert c.read_mask(dataset.labels).sum() == HEIGHT * WIDTH // 2


def test_least_folder(tmp_path):
    picture(tmp_path / "images/a.JPG")
    (tmp_path / "labels.csv").write_text("image,tag:gland\na,1\n")
    assert told(tmp_path) == []
    (record,) = read_folder(tmp_path).splits["train"]
    assert record.image.name == "a.JPG"
    assert read_folder(tmp_path).labels.names == ("gland",)
    (tmp_path / "labels.csv").write_text("image,tag:gland\na.jpg,1\n")
    assert told(tmp_path) == []


def test_spreadsheet_table_with_semicolons_byte_order_mark_and_windows_lines(folder):
    columns, *rows = [line.split(",") for line in TABLE.splitlines()]
    lines = [";".join(columns)] + [";".join(c.replace(".", ",") if "png" not in c else c for c in row) for row in rows]
    (folder / "labels.csv").write_bytes("\r\n".join([*lines, ""]).encode("utf-8-sig"))
    assert told(folder) == []
    assert read_folder(folder).splits["val"][0].proportions.values.tolist() == [0.25, 0.75]


def test_points_from_qupath(folder):
    (folder / "points.csv").unlink()
    place = folder / "points/sub/c.geojson"
    place.parent.mkdir(parents=True)
    feature = {
        "type": "Feature",
        "geometry": {"type": "MultiPoint", "coordinates": [[0.5, 3.5], [12, 1]]},
        "properties": {"classification": {"name": "gland"}},
    }
    place.write_text(json.dumps([feature]))
    assert read_folder(folder).splits["test"][0].points.rows.tolist() == [[3, 0, 0], [1, 12, 0]]
    (problem,) = told(folder)
    assert problem.startswith(
        "points/sub/c.geojson: warning: feature 1, point (row 1, column 12) is gland, but the mask"
    )


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _labels(old: str, new: str):
    return lambda root: edit(root / "labels.csv", old, new)


def _points(text: str):
    return lambda root: (root / "points.csv").write_text(POINTS + text)


def _mask(values: np.ndarray):
    return lambda root: mask(root / "masks/a.png", values)


def _no_hints(root: Path) -> None:
    (root / "points.csv").unlink()
    (root / "labels.csv").write_text("image,split\na,train\nb,val\nsub/c,test\n")


def _no_hints_no_masks(root: Path) -> None:
    _no_hints(root)
    for path in (root / "masks").rglob("*.png"):
        path.unlink()


def _geojson_beside_table(root: Path) -> None:
    (root / "points").mkdir()
    feature = {
        "geometry": {"type": "Point", "coordinates": [1, 1]},
        "properties": {"classification": {"name": "gland"}},
    }
    (root / "points/a.geojson").write_text(json.dumps([feature]))


def _geojson_of_nothing(root: Path) -> None:
    _geojson_beside_table(root)
    (root / "points/a.geojson").rename(root / "points/z.geojson")


def _latin(root: Path) -> None:
    (root / "labels.csv").write_bytes(TABLE.replace("p2", "Müller").encode("latin-1"))


def _mask_by_case(root: Path) -> None:
    (root / "masks/a.png").rename(root / "masks/A.png")


def _jpeg_mask(root: Path) -> None:
    (root / "masks/a.png").unlink()
    mask(root / "masks/a.jpg")


GREY = np.zeros((HEIGHT, WIDTH))
STRIPES = np.where(np.arange(WIDTH) < WIDTH // 2, 0, 255) * np.ones((HEIGHT, 1))
ODD = np.where(np.arange(WIDTH) < WIDTH // 2, 0, 7) * np.ones((HEIGHT, 1))

ERRORS = {
    "unknown column": (_labels("group", "grp"), "labels.csv:1: column 'grp' is unknown; did you mean 'group'?"),
    "class unknown": (_labels("tag:stroma", "tag:strom"), "labels.csv:1: column 'tag:stroma' is missing"),
    "no image column": (_labels("image", "img"), "labels.csv:1: column 'image' is missing"),
    "column twice": (_labels("group", "split"), "labels.csv:1: column 'split' stands there twice"),
    "column without name": (_labels("group", ""), "labels.csv:1: header has a column without a name"),
    "white tagged": (_labels("group", "tag:white"), "labels.csv:1: column 'tag:white' names the white class"),
    "cells missing": (_labels("0.25,0.75,", "0.25,0.75"), "labels.csv:3: line has 7 cells for 8 columns"),
    "cells too many": (_labels("0.25,0.75,", "0,25,0,75,"), "labels.csv:3: line has 10 cells for 8 columns"),
    "quote open": (_labels("sub/c", '"sub/c'), "labels.csv:4: line is broken"),
    "no image cell": (_labels("b,valid", ",valid"), "labels.csv:3: column 'image' is empty"),
    "image missing": (_labels("b,valid", "x,valid"), "labels.csv:3: image 'x' is not in images/; add the file"),
    "image by case": (_labels("b,valid", "B.png,valid"), "image 'B.png' is not in images/; did you mean 'b.png'?"),
    "other suffix": (_labels("a.png", "a.jpg"), "labels.csv:2: image 'a.jpg' is not in images/; did you mean 'a.png'?"),
    "image twice": (_labels("sub/c.png", "a"), "labels.csv:4: image 'a' stands in line 2 already"),
    "split": (_labels("valid", "dev"), "labels.csv:3: split 'dev' is none of train, val (or valid), test"),
    "um per px": (_labels("0.5\n", "-1\n"), "labels.csv:2: um_per_px is '-1', pixel sizes are positive"),
    "tag": (_labels("p2,1,1", "p2,1,yes"), "labels.csv:3: tag:stroma of image 'b' is 'yes', tags are 0 or 1"),
    "tag empty": (_labels("p2,1,1", "p2,1,"), "labels.csv:3: tag:stroma of image 'b' is empty"),
    "proportion": (_labels("0.25", "25%"), "labels.csv:3: proportion:gland of image 'b' is '25%'"),
    "proportion range": (_labels("0.25", "-0.25"), "labels.csv:3: proportion:gland of image 'b' is '-0.25'"),
    "proportion sum": (_labels("0.25", "0.2"), "labels.csv:3: proportions of image 'b' sum to 0.95, not 1"),
    "per cent": (_labels("0.25,0.75", "25,75"), "labels.csv:3: proportions of image 'b' sum to 100, not 1: they look"),
    "not UTF-8": (_latin, "labels.csv:3: line has bytes that are not UTF-8; save it as 'CSV UTF-8'"),
    "UTF-16": (
        lambda root: (root / "labels.csv").write_text(TABLE, encoding="utf-16"),
        "labels.csv:1: table is UTF-16, tables are UTF-8; save it as 'CSV UTF-8'",
    ),
    "table empty": (lambda root: (root / "labels.csv").write_text(""), "labels.csv: table is empty"),
    "table of a header": (
        lambda root: (root / "labels.csv").write_text("image\n"),
        "labels.csv: table lists no images",
    ),
    "table missing": (lambda root: (root / "labels.csv").unlink(), "labels.csv: table is missing"),
    "same name": (
        lambda root: picture(root / "images/a.bmp"),
        "images/a.png: file has the same name as 'images/a.bmp'",
    ),
    "same id": (lambda root: picture(root / "images/sub__c.png"), "file has the same name as 'images/sub__c.png'"),
    "mask of no image": (
        _mask_by_case,
        "masks/A.png: mask has no image of the same name; did",
    ),
    "mask with loss": (_jpeg_mask, "masks/a.jpg: mask is compressed with loss"),
    "point outside": (_points("a,12,0,gland\n"), "points.csv:5: point (row 12, column 0) of image 'a' lies outside"),
    "point class": (_points("a,1,1,bone\n"), "points.csv:5: class of a point is 'bone'"),
    "point fraction": (_points("a,1.5,1,gland\n"), "points.csv:5: row of a point is '1.5'"),
    "point twice": (_points("a,1,2,stroma\n"), "points.csv:5: point (row 1, column 2) of image 'a' is stroma here and"),
    "point of nothing": (_points("x,1,1,gland\n"), "points.csv:5: image 'x' is not in images/"),
    "point columns": (lambda root: edit(root / "points.csv", "row,", "y,"), "points.csv:1: column 'row' is missing"),
    "two sources": (
        _geojson_beside_table,
        "points/a.geojson: file gives points to an image that has points in points.",
    ),
    "points of nothing": (_geojson_of_nothing, "points/z.geojson: file belongs to no image of labels.csv"),
    "classes no JSON": (lambda root: (root / "classes.json").write_text("{\n"), "classes.json:2: file is no JSON"),
    "classes no names": (
        lambda root: (root / "classes.json").write_text("{}"),
        "classes.json: file has no list 'names'",
    ),
    "classes white": (
        lambda root: (root / "classes.json").write_text('{"names": ["gland", "stroma", "white"], "white": "2"}'),
        "classes.json: file has white '2' and ignore 255",
    ),
    "classes twice": (
        lambda root: (root / "classes.json").write_text('{"names": ["gland", "gland"]}'),
        "classes.json: label space ['gland', 'gland'] has a name twice",
    ),
    "no hints": (_no_hints_no_masks, "labels.csv: table and its folder have no hint"),
    "no images": (lambda root: [p.unlink() for p in (root / "images").rglob("*.png")], "images: folder has no images"),
}

# reading does not decode: these are raised when the image or the mask is used
DECODING_ERRORS = {
    "image truncated": (
        lambda root: _truncate(root / "images/b.png"),
        "images/b.png: image cannot be read as an image",
    ),
    "image no image": (lambda root: (root / "images/b.png").write_text("x"), "images/b.png: image cannot be read as"),
    "mask truncated": (lambda root: _truncate(root / "masks/b.png"), "masks/b.png: mask cannot be read as an image"),
    "mask of colours": (lambda root: picture(root / "masks/a.png"), "masks/a.png: mask has mode RGB"),
    "mask size": (_mask(GREY[:-1]), "masks/a.png: mask is 11 x 16 pixels (height x width), its image 12 x 16"),
    "mask value": (_mask(ODD), "masks/a.png: mask has values that are no class: 7 (96 px); classes are 0..2"),
}

WARNINGS = {
    "unlisted": (
        lambda root: picture(root / "images/z.png"),
        "images/z.png: warning: image is not listed in labels.csv",
    ),
    "no image format": (
        lambda root: (root / "images/z.webp").write_text("x"),
        "images/z.webp: warning: file is none of",
    ),
    "group in two splits": (
        _labels("p2", "p1"),
        "labels.csv:3: warning: group 'p1' is in val here and in train in line 2",
    ),
    "tags all zero": (_labels("p1,1,1", "p1,0,0"), "labels.csv:2: warning: image 'a.png' has no tag that is 1"),
    "tag against mask": (_labels("p2,1,1", "p2,1,0"), "labels.csv:3: warning: image 'b.png' has no tag 'stroma', but"),
    "mask against tag": (_mask(GREY), "labels.csv:2: warning: image 'a.png' has tag 'stroma', but its mask has none"),
    "proportion against mask": (_labels("0.25,0.75", "0,1"), "labels.csv:3: warning: image 'b.png' has 0% 'gland'"),
    "point against mask": (
        _points("a,3,3,1\n"),
        "points.csv:5: warning: point (row 3, column 3) of image 'a' is stroma",
    ),
    "mask of 0 and 255": (_mask(STRIPES), "masks/a.png: warning: mask has the values 0 and 255 only"),
    "test without mask": (
        lambda root: (root / "masks/b.png").unlink(),
        "images/b.png: warning: image is a val image without a mask",
    ),
    "no train": (_labels("train", "test"), "labels.csv: warning: table has no image in train"),
    "train without hint": (
        _labels("b,valid,p2,1,1,0.25,0.75", "b,train,p2,,,,"),
        "labels.csv:3: warning: image 'b.png' is a training image without any hint",
    ),
    "masks but no hints": (_no_hints, "labels.csv: warning: table and its folder have no hint"),
}


def check_finds(folder: Path, message: str) -> None:
    found = told(folder)
    assert any(message in problem for problem in found), found
    assert all("\n" not in problem for problem in found)


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_found_and_stops_reading(folder, name):
    spoil, message = ERRORS[name]
    spoil(folder)
    check_finds(folder, message)
    with pytest.raises(InputError) as error:
        read_folder(folder)
    assert str(error.value).startswith(str(folder))


@pytest.mark.parametrize("name", DECODING_ERRORS)
def test_error_of_a_file_is_found_and_raised_on_use(folder, name):
    spoil, message = DECODING_ERRORS[name]
    (folder / "points.csv").unlink()  # for points the size of the image is read
    spoil(folder)
    check_finds(folder, message)
    dataset = read_folder(folder)
    broken = dataset.splits["train" if "/a.png" in message else "val"][0]
    with pytest.raises(InputError, match=message.split(":")[0]):
        broken.read_image() if message.startswith("images") else broken.read_mask(dataset.labels)


@pytest.mark.parametrize("name", WARNINGS)
def test_warning_is_found_and_does_not_stop_reading(folder, name):
    spoil, message = WARNINGS[name]
    spoil(folder)
    if name == "train without hint":
        edit(folder / "points.csv", "b.png,0,0,0\n", "")
    check_finds(folder, message)
    assert all(problem.severity == "warning" for problem in check_folder(folder))
    read_folder(folder)


def test_group_in_two_splits_is_told_once_for_a_split(folder):
    for name in ("d", "e"):
        picture(folder / f"images/{name}.png")
        mask(folder / f"masks/{name}.png")
    text = (folder / "labels.csv").read_text()
    rows = "d,val,p1,1,1,0.5,0.5,\ne,val,p1,1,1,0.5,0.5,\n"
    (folder / "labels.csv").write_text(text.replace("p3", "p1") + rows)
    assert [(problem.line, problem.severity) for problem in check_folder(folder)] == [(4, "warning"), (5, "warning")]


def test_missing_folder_is_one_problem(tmp_path):
    (problem,) = check_folder(tmp_path / "nowhere")
    assert "does not exist" in str(problem)
    with pytest.raises(InputError, match="does not exist"):
        read_folder(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    assert told(tmp_path) == [
        "images: folder is missing; put the images into a folder 'images'",
        "labels.csv: table is missing; write one with a column 'image' and one row per image",
    ]


def test_masks_without_class_names(folder):
    (folder / "classes.json").unlink()
    _no_hints(folder)
    assert any("classes.json: file is missing" in problem for problem in told(folder))
    with pytest.raises(InputError, match=r"classes\.json"):
        read_folder(folder)


def test_all_problems_in_one_pass_and_reading_says_how_many(folder):
    edit(folder / "labels.csv", "p1,1,1,0.5,0.5", "p1,1,7,0.5,0.4")
    edit(folder / "labels.csv", "b,valid", "x,dev")
    _points("a,99,0,gland\n")(folder)
    _truncate(folder / "images/sub/c.png")
    mask(folder / "masks/a.png", ODD)
    problems = check_folder(folder)
    places = [(problem.file, problem.line) for problem in problems if problem.severity == "error"]
    assert places == [
        ("labels.csv", 2),
        ("labels.csv", 2),
        ("labels.csv", 3),
        ("labels.csv", 3),
        ("points.csv", 4),
        ("points.csv", 5),
        ("masks/a.png", None),
        ("images/sub/c.png", None),
    ]
    message = rf"labels\.csv:2: tag:stroma .* \(6 errors in all, 'tissuehint data check {folder}' lists them\)"
    with pytest.raises(InputError, match=message):
        read_folder(folder)


def phantom(count: int = 3) -> TissueDataset:
    """A data set in memory with masks and all classes."""
    generator = np.random.default_rng(0)
    records = []
    for index in range(count):
        values = generator.integers(0, 3, (3, 4)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        values[:8, :8], values[0, 0] = index % 2, 255
        image = generator.integers(0, 256, (24, 32, 3)).astype(np.uint8)
        records.append(Record(f"p{index}", image, values, group=f"g{index}", um_per_px=0.5))
    records.append(Record("empty", image, np.full((24, 32), 2, np.uint8)))
    return TissueDataset("phantom", SPACE, {"train": tuple(records[:2]), "val": (), "test": tuple(records[2:])}, ("n",))


def test_weaken_writes_a_folder_that_is_read_back(tmp_path):
    weaken(phantom(), tmp_path / "out", tag_threshold=0.05, points_per_class=3, round_to=0.1, noise=0.01, seed=4)
    assert [p for p in check_folder(tmp_path / "out") if p.severity == "error"] == []
    dataset = read_folder(tmp_path / "out")
    assert dataset.labels == SPACE
    assert dataset.notes[0] == "n"
    assert "tags above 5% of the area; 3 points per class" in dataset.notes[1]
    assert {split: [record.id for record in records] for split, records in dataset.splits.items()} == {
        "train": ["p0", "p1"],
        "val": [],
        "test": ["p2", "empty"],
    }
    for written, source in zip(dataset.splits["train"], phantom().splits["train"], strict=True):
        np.testing.assert_array_equal(written.read_image(), source.image)
        np.testing.assert_array_equal(written.read_mask(SPACE), source.mask)
        assert (written.group, written.um_per_px) == (source.group, 0.5)
        rows = written.points.rows
        assert len(rows) == 6
        assert (source.mask[rows[:, 0], rows[:, 1]] == rows[:, 2]).all()
        assert (written.proportions.values * 10 == (written.proportions.values * 10).round()).all()
    empty = dataset.splits["test"][1]
    assert (empty.proportions, empty.points) == (None, None)
    assert empty.tags.values.tolist() == [0, 0]


def test_weaken_is_the_same_for_an_image_whatever_its_neighbours(tmp_path):
    whole = phantom()
    part = TissueDataset("part", SPACE, {"train": whole.splits["train"][1:]})
    weaken(whole, tmp_path / "whole", noise=0.02)
    weaken(part, tmp_path / "part", noise=0.02)
    for read, name in ((read_tag_table, "labels"), (read_proportion_table, "labels"), (read_point_table, "points")):
        one, other = (read(tmp_path / place / f"{name}.csv", SPACE)["p1.png"] for place in ("whole", "part"))
        np.testing.assert_array_equal(vars(one).popitem()[1], vars(other).popitem()[1])


def test_weaken_gives_exact_proportions_by_default(tmp_path):
    weaken(phantom(), tmp_path / "out")
    found = read_proportion_table(tmp_path / "out/labels.csv", SPACE)
    expected = proportions_from_mask(phantom().splits["train"][0].mask, SPACE)
    np.testing.assert_allclose(found["p0.png"].values, expected.values, rtol=1e-9)


def test_weaken_leaves_a_table_that_is_there_alone(folder):
    with pytest.raises(InputError, match="exists already"):
        weaken(read_folder(folder), folder)
    assert (folder / "labels.csv").read_text() == TABLE


def test_weaken_needs_masks_and_writes_nothing_without(folder, tmp_path):
    (folder / "masks/b.png").unlink()
    with pytest.raises(InputError, match="b: has no mask to derive"):
        weaken(read_folder(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_write_folder_keeps_image_files_and_hints(folder, tmp_path):
    dataset = read_folder(folder)
    write_folder(dataset, tmp_path / "copy")
    copy = read_folder(tmp_path / "copy")
    assert (tmp_path / "copy/images/sub__c.png").read_bytes() == (folder / "images/sub/c.png").read_bytes()
    for split, records in dataset.splits.items():
        for one, other in zip(records, copy.splits[split], strict=True):
            assert (one.id, one.group, one.um_per_px) == (other.id, other.group, other.um_per_px)
            for hint in ("tags", "proportions"):
                np.testing.assert_array_equal(getattr(one, hint).values, getattr(other, hint).values)
            assert (one.points is None) == (other.points is None)
            if one.points is not None:
                np.testing.assert_array_equal(one.points.rows, other.points.rows)


def test_write_folder_leaves_out_columns_of_hints_that_nobody_has(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    record = Record("a", image, None, Tags([1, 0]), Points([]), None)
    other = Record("b, with comma", image, None, None, None, Proportions([0.5, 0.5]))
    write_folder(TissueDataset("tiny", SPACE, {"train": (record,)}), tmp_path / "tags")
    assert (tmp_path / "tags/labels.csv").read_text() == (
        "image,split,group,tag:gland,tag:stroma,um_per_px\na.png,train,,1,0,\n"
    )
    write_folder(TissueDataset("tiny", SPACE, {"train": (record, other)}), tmp_path / "both")
    first, second = read_folder(tmp_path / "both").splits["train"]
    assert (second.id, second.tags, first.proportions) == ("b, with comma", None, None)


def test_example_of_the_how_to_page(tmp_path):
    page = (Path(__file__).parents[2] / "docs/how-to/own-data.md").read_text(encoding="utf-8")
    table = next(block for block in page.split("```") if block.startswith("\nimage,split"))
    points = next(block for block in page.split("```") if block.startswith("\nimage,row"))
    classes = next(block for block in page.split("```") if block.startswith("json"))
    for name in ("case1_a", "case1_b", "case2/a", "case3_a"):
        picture(tmp_path / f"images/{name}.png", 130, 210)
    (tmp_path / "labels.csv").write_text(table.lstrip("\n"))
    (tmp_path / "points.csv").write_text(points.lstrip("\n"))
    (tmp_path / "classes.json").write_text(classes.removeprefix("json"))
    assert told(tmp_path) == []
    assert [len(records) for records in read_folder(tmp_path).splits.values()] == [2, 1, 1]
