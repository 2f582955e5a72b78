from __future__ import annotations

import json

import pytest

from tests.slides.view.predicted import running, write_map, write_slide
from tissuehint.errors import InputError
from tissuehint.slides.view.collection import Collection


@pytest.fixture
def slide(tmp_path):
    return write_slide(tmp_path / "slides" / "case7.png")


def change(folder, **changes):
    path = folder / "slide.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_folder_must_hold_slides(tmp_path, slide):
    with pytest.raises(InputError, match="does not exist"):
        Collection(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a folder"):
        Collection(slide)
    with pytest.raises(InputError, match=r"no slide.*tissuehint predict"):
        Collection(tmp_path / "slides")
    write_map(tmp_path / "maps" / "one", slide)
    with pytest.raises(InputError, match=r"--slides .*nowhere.*does not exist"):
        Collection(tmp_path / "maps", [tmp_path / "nowhere"])


def test_folder_of_one_slide(tmp_path, slide):
    folder = write_map(tmp_path / "maps" / "one", slide)
    assert [record.key for record in Collection(folder).records()] == ["one"]


def test_slides_are_in_natural_order(tmp_path, slide):
    for name in ("s10", "s9", "S1", "b"):
        write_map(tmp_path / "maps" / name, slide)
    write_map(tmp_path / "maps" / ".work", slide)
    assert [record.key for record in Collection(tmp_path / "maps").records()] == ["b", "S1", "s9", "s10"]


DAMAGES = {
    "text": lambda folder: (folder / "slide.json").write_text("{"),
    "binary": lambda folder: (folder / "slide.json").write_bytes(b"\xff\xfe\x00"),
    "list": lambda folder: (folder / "slide.json").write_text("[]"),
    "deep": lambda folder: (folder / "slide.json").write_text("[" * 100000),
    "no state": lambda folder: (folder / "slide.json").write_text('{"format": 1}'),
    "other state": lambda folder: change(folder, state=["done"]),
    "newer": lambda folder: change(folder, format=2),
    "no map": lambda folder: change(folder, map={}),
    "map of text": lambda folder: change(folder, map="text"),
    "no labels": lambda folder: change(folder, labels={"names": []}),
    "scale 0": lambda folder: change(
        folder, map={**json.loads((folder / "slide.json").read_text())["map"], "scale": 0}
    ),
    "no number": lambda folder: change(
        folder, map={**json.loads((folder / "slide.json").read_text())["map"], "top": float("nan")}
    ),
    "no classes": lambda folder: (folder / "classes.ome.tif").unlink(),
    "areas": lambda folder: (folder / "areas.csv").write_text("class,pixels\na,1\n"),
    "area of text": lambda folder: (folder / "areas.csv").write_text("class,mm2,percent_of_tissue\na,x,1\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_slide_is_a_failed_one(tmp_path, slide, damage):
    write_map(tmp_path / "maps" / "sound", slide)
    DAMAGES[damage](write_map(tmp_path / "maps" / "hurt", slide))
    hurt, sound = Collection(tmp_path / "maps").records()
    assert (hurt.key, hurt.state, sound.state) == ("hurt", "failed", "done")
    assert hurt.error
    assert "\n" not in hurt.error
    assert "predict again" in hurt.error or "update tissuehint" in hurt.error


def test_running_slide_waits(tmp_path, slide):
    folder = tmp_path / "maps" / "one"
    folder.mkdir(parents=True)
    (folder / "slide.json").write_text('{"format": 1, "name": "one", "state": "running", "attempts": 1}')
    collection = Collection(tmp_path / "maps")
    assert collection.records()[0].state == "running"
    (folder / "slide.json").unlink()
    folder.rmdir()
    write_map(folder, slide)
    assert [record.state for record in collection.scan()] == ["done"]
    (folder / "slide.json").unlink()
    assert collection.scan() == []


def test_slide_is_where_it_was_or_where_it_went(tmp_path, slide):
    folder = write_map(tmp_path / "maps" / "one", slide)
    moved = tmp_path / "archive" / "2024" / "deep" / slide.name
    geometry = Collection(folder).records()[0].geometry

    def find(*slides):
        return Collection(folder, slides).finder.find(geometry)

    assert find(slide.parent) == (slide.resolve(), "")
    assert find(tmp_path) == (slide.resolve(), "")
    path, reason = find()
    assert path is None
    assert reason.endswith(f"--slides {slide.parent}")
    moved.parent.mkdir(parents=True)
    slide.rename(moved)
    assert find(tmp_path / "archive") == (moved.resolve(), "")
    assert find(moved.parent) == (moved.resolve(), "")
    assert find(slide.parent)[0] is None
    moved.write_bytes(moved.read_bytes() + b"more")
    path, reason = find(tmp_path / "archive")
    assert path is None
    assert f"{geometry.bytes + 4} bytes" in reason


def test_slide_within_the_folder_needs_no_option(tmp_path):
    slide = write_slide(tmp_path / "maps" / "slides" / "case7.png")
    write_map(tmp_path / "maps" / "one", slide)
    with running(tmp_path / "maps") as server:
        assert server.get("/api/slides/one").json()["pixels"] == "slide"


def test_windows_path_of_another_computer(tmp_path, slide):
    folder = write_map(tmp_path / "maps" / "one", slide)
    record = json.loads((folder / "slide.json").read_text())
    change(folder, slide={**record["slide"], "path": rf"D:\scans\{slide.name}"})
    geometry = Collection(folder).records()[0].geometry
    assert Collection(folder, [slide.parent]).finder.find(geometry)[0] == slide.resolve()
    assert Collection(folder).finder.find(geometry)[1].endswith(r"--slides D:\scans")


def test_another_slide_of_that_name_and_size_is_not_shown(tmp_path):
    from PIL import Image

    small = tmp_path / "slides" / "case7.png"
    slide = write_slide(small)
    folder = write_map(tmp_path / "maps" / "one", slide)
    Image.new("RGB", (900, 700)).save(small)
    record = json.loads((folder / "slide.json").read_text())
    change(folder, slide={**record["slide"], "bytes": small.stat().st_size})
    with running(tmp_path / "maps", tmp_path / "slides") as server:
        answer = server.get("/api/slides/one").json()
    assert answer["pixels"] == "thumbnail"
    assert "700 x 900" in answer["notes"][0]


def test_only_some_slides_stay_open(tmp_path, slide):
    for index in range(6):
        write_map(tmp_path / "maps" / f"s{index}", slide)
    collection = Collection(tmp_path / "maps", [slide.parent])
    opened = [collection.opened(record) for record in collection.records()]
    assert collection.opened(collection.record("s5")) is opened[5]
    assert collection.opened(collection.record("s3")) is opened[3]
    assert collection.opened(collection.record("s0")) is not opened[0]
