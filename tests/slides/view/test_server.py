from __future__ import annotations

import io
import json
import threading

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.slides.view.predicted import (
    GROUND,
    IGNORE,
    LABELS,
    MARK,
    PLACEMENT,
    SQUARE,
    STROMA,
    TUMOUR,
    UM,
    marked_map,
    running,
    shares_of,
    square,
    write_map,
    write_slide,
)

NAME = "case 7 (left) 100%"
ADDRESS = "/slides/case%207%20(left)%20100%25"
API = "/api" + ADDRESS
LEVELS = (8, 9, 10, 11)  # of a slide of 1100 px: 8, 4, 2 and 1 level-0 px a pixel


@pytest.fixture(scope="module")
def classes():
    return marked_map()


@pytest.fixture(scope="module")
def server(tmp_path_factory, classes):
    folder = tmp_path_factory.mktemp("view")
    slide = write_slide(folder / "slides" / "case7.png")
    write_map(folder / "maps" / NAME, slide, probabilities=shares_of(classes))
    bounds = {"slide": {**json.loads((folder / "maps" / NAME / "slide.json").read_text())["slide"]}}
    bounds["slide"]["bounds"] = [32, 64, 600, 900]
    write_map(folder / "maps" / "plain", slide, **bounds)
    (folder / "maps" / "bad").mkdir()
    failed = {"format": 1, "name": "bad", "state": "failed", "error": "bad.svs: is truncated; copy it again"}
    (folder / "maps" / "bad" / "slide.json").write_text(json.dumps(failed))
    with running(folder / "maps", folder / "slides") as server:
        yield server


def picture(answer) -> np.ndarray:
    assert answer.status == 200, answer
    return np.asarray(Image.open(io.BytesIO(answer.body)).convert("RGBA"))


def whole(server, layer: str, level: int, ending: str, query: str = "") -> np.ndarray:
    """All tiles of a level, put together as they are asked for."""
    step = 2 ** (11 - level)
    rows = []
    for row in range(-(-700 // (256 * step))):
        columns = range(-(-1100 // (256 * step)))
        path = f"{ADDRESS}/{layer}/{level}/{{}}_{row}.{ending}{query}"
        rows.append(np.concatenate([picture(server.get(path.format(column))) for column in columns], 1))
    return np.concatenate(rows)


@pytest.mark.parametrize("level", LEVELS)
def test_class_tiles_lie_on_the_slide(server, level):
    step = 2 ** (11 - level)
    shown = whole(server, "classes", level, "png", "?classes=0")
    assert shown.shape == (-(-700 // step), -(-1100 // step), 4)
    expected = np.zeros(shown.shape[:2], bool)
    expected[square(step)] = True
    np.testing.assert_array_equal(shown[..., 3] == 255, expected)
    np.testing.assert_array_equal(shown[..., 3] == 0, ~expected)
    assert {tuple(colour) for colour in shown[expected][:, :3]} == {LABELS.colours[TUMOUR]}


@pytest.mark.parametrize("level", LEVELS)
def test_slide_tiles_show_the_same_square(server, level):
    step = 2 ** (11 - level)
    shown = whole(server, "slide", level, "jpg")[..., :3].astype(int)
    assert shown.shape[:2] == (-(-700 // step), -(-1100 // step))
    rows, columns = square(step)
    inner = shown[rows.start + 1 : rows.stop - 1, columns.start + 1 : columns.stop - 1]
    assert np.abs(inner - MARK).max() <= 12
    outside = np.ones(shown.shape[:2], bool)
    outside[rows.start - 1 : rows.stop + 1, columns.start - 1 : columns.stop + 1] = False
    outside[700 // step :] = outside[:, 1100 // step :] = False
    assert np.abs(shown[outside] - GROUND).max() <= 12


def test_every_class_is_where_the_map_has_it(server, classes):
    shown = whole(server, "classes", 11, "png")
    rows, columns = np.arange(700) + 0.5, np.arange(1100) + 0.5
    down = np.floor((rows - PLACEMENT.top) / PLACEMENT.scale).astype(int)
    across = np.floor((columns - PLACEMENT.left) / PLACEMENT.scale).astype(int)
    inside = ((down >= 0) & (down < len(classes)))[:, None] & ((across >= 0) & (across < classes.shape[1]))
    expected = np.where(inside, classes[down.clip(0, 189)][:, across.clip(0, 299)], IGNORE)
    # white, ignore, and what lies beside the map are not painted
    np.testing.assert_array_equal(shown[..., 3] == 255, expected < LABELS.num_tissue)
    for index in (TUMOUR, STROMA):
        assert (shown[expected == index][:, :3] == LABELS.colours[index]).all()


@pytest.mark.parametrize(
    ("query", "painted"),
    [("", {0, 1}), ("?classes=0,1", {0, 1}), ("?classes=1", {1}), ("?classes=", set()), ("?classes=2,255", set())],
)
def test_classes_are_chosen(server, query, painted):
    shown = picture(server.get(f"{ADDRESS}/classes/8/0_0.png{query}"))
    colours = {tuple(colour) for colour in shown[shown[..., 3] > 0][:, :3]}
    assert colours == {LABELS.colours[index] for index in painted}


def test_probabilities_are_those_of_the_array(server, classes):
    shares = shares_of(classes)
    random = np.random.default_rng(0)
    for row, column in zip(random.integers(0, 190, 30), random.integers(0, 300, 30), strict=True):
        y, x = PLACEMENT.to_slide(row + 0.7, column + 0.2)
        answer = server.get(f"{API}/at?x={x}&y={y}").json()
        value = int(classes[row, column])
        if value == IGNORE:
            assert answer == {"class": None, "name": None, "probabilities": None}
            continue
        assert (answer["class"], answer["name"]) == (value, LABELS.names[value])
        np.testing.assert_allclose(answer["probabilities"], shares[:, row, column] / 255, atol=5e-5)


@pytest.mark.parametrize(("x", "y"), [(-5, 100), (300, 20), (1099, 100), (300, 10**9), (-(10**300), 5)])
def test_nothing_is_known_beside_the_map(server, x, y):
    assert server.get(f"{API}/at?x={x}&y={y}").json() == {"class": None, "name": None, "probabilities": None}


def test_class_alone_without_probabilities(server):
    x, y = SQUARE["left"] + 5, SQUARE["top"] + 5
    answer = server.get(f"/api/slides/plain/at?x={x}&y={y}").json()
    assert answer == {"class": TUMOUR, "name": "tumour", "probabilities": None}


def test_list_of_slides(server, classes):
    answer = server.get("/api/slides").json()
    assert answer["folder"] == "maps"
    bad, mapped, plain = answer["slides"]
    assert (bad["state"], bad["error"]) == ("failed", "bad.svs: is truncated; copy it again")
    assert (mapped["key"], mapped["state"], plain["name"]) == (NAME, "done", "plain")
    counts = np.bincount(classes.reshape(-1), minlength=3)[:3] * PLACEMENT.um_per_px**2 / 1e6
    tumour, stroma, white = mapped["classes"]
    assert [one["mm2"] for one in mapped["classes"]] == pytest.approx(counts.tolist())
    assert tumour["percent"] + stroma["percent"] == pytest.approx(100)
    assert (tumour["colour"], tumour["painted"], white["painted"], white["percent"]) == ("#c81e28", True, False, None)
    assert mapped["tissue_mm2"] == pytest.approx(counts[:2].sum())


def test_description_of_a_slide(server):
    answer = server.get(API).json()
    assert (answer["height"], answer["width"], answer["um_per_px"], answer["map_um_per_px"]) == (700, 1100, UM, 1.6)
    assert (answer["pixels"], answer["probabilities"], answer["notes"]) == ("slide", True, [])
    assert (answer["first_level"], answer["last_level"], answer["tile"]) == (8, 11, 256)
    assert (answer["file"], answer["model"]) == ("case7.png", "pbip-seed0")
    plain = server.get("/api/slides/plain").json()
    assert (plain["corner"], plain["probabilities"]) == ({"x": 64, "y": 32}, False)


@pytest.mark.parametrize("name", ["thumbnail.jpg", "overlay.jpg"])
def test_pictures_of_the_list_are_small(server, name):
    shown = picture(server.get(f"{ADDRESS}/{name}"))
    assert shown.shape[:2] == (175, 275)
    assert np.abs(shown[80, 160, :3].astype(int) - MARK).max() < 12


@pytest.mark.parametrize(
    "path",
    [
        "/slides/bad/slide/8/0_0.jpg",
        "/slides/bad/classes/8/0_0.png",
        "/api/slides/bad",
        "/api/slides/nobody",
        f"{ADDRESS}/slide/7/0_0.jpg",
        f"{ADDRESS}/slide/12/0_0.jpg",
        f"{ADDRESS}/slide/11/5_0.jpg",
        f"{ADDRESS}/slide/11/0_3.jpg",
        f"{ADDRESS}/slide/11/-1_0.jpg",
        f"{ADDRESS}/classes/11/9999999999999999999999_0.png",
        f"{ADDRESS}/other/8/0_0.png",
        f"{ADDRESS}/slide.json",
        "/static/page.py",
    ],
)
def test_what_is_not_there_is_not_found(server, path):
    assert server.get(path).status == 404


@pytest.mark.parametrize("query", ["", "?x=1", "?x=nan&y=1", "?x=1&y=inf", "?x=a&y=b"])
def test_places_are_numbers(server, query):
    assert server.get(f"{API}/at{query}").status == 400
    assert server.get(f"{ADDRESS}/classes/8/0_0.png?classes=x").status == 400


def test_many_threads_get_the_same(server):
    paths = [f"{ADDRESS}/classes/11/{column}_{row}.png" for column in range(5) for row in range(3)]
    paths += [path.replace("classes", "slide").replace("png", "jpg") for path in paths]
    expected = [server.get(path).body for path in paths]
    failures = []

    def ask(order):
        failures.extend(paths[index] for index in order if server.get(paths[index]).body != expected[index])

    orders = [np.random.default_rng(seed).permutation(len(paths)) for seed in range(6)]
    threads = [threading.Thread(target=ask, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_thumbnail_in_place_of_a_slide_elsewhere(tmp_path):
    slide = write_slide(tmp_path / "elsewhere" / "case7.png")
    write_map(tmp_path / "maps" / "one", slide)
    with running(tmp_path / "maps") as server:
        answer = server.get("/api/slides/one").json()
        assert answer["pixels"] == "thumbnail"
        assert f"--slides {tmp_path / 'elsewhere'}" in answer["notes"][0]
        for level in LEVELS:
            step = 2 ** (11 - level)
            rows, columns = square(step)
            column, row = columns.start // 256, rows.start // 256
            tile = picture(server.get(f"/slides/one/slide/{level}/{column}_{row}.jpg"))[..., :3].astype(int)
            # a thumbnail of a quarter of the size is soft: its border of 4 px is not judged
            margin = max(1, round(6 / step))
            top, left = rows.start - 256 * row, columns.start - 256 * column
            bottom, right = min(256, rows.stop - 256 * row), min(256, columns.stop - 256 * column)
            assert np.abs(tile[top + margin : bottom - margin, left + margin : right - margin] - MARK).max() <= 16
            if left > margin:
                assert np.abs(tile[top:bottom, : left - margin] - GROUND).max() <= 16


def test_map_alone(tmp_path):
    slide = write_slide(tmp_path / "elsewhere" / "case7.png")
    folder = write_map(tmp_path / "maps" / "one", slide)
    (folder / "thumbnail.jpg").unlink()
    (folder / "areas.csv").unlink()
    with running(tmp_path / "maps") as server:
        answer = server.get("/api/slides/one").json()
        assert answer["pixels"] is None
        assert answer["tissue_mm2"] is None
        assert server.get("/slides/one/slide/8/0_0.jpg").status == 404
        assert server.get("/slides/one/classes/8/0_0.png").status == 200


def test_damaged_files_are_said_and_others_work(tmp_path):
    slide = write_slide(tmp_path / "slides" / "case7.png")
    for name in ("shares", "picture", "map", "sound"):
        write_map(tmp_path / "maps" / name, slide, probabilities=shares_of(marked_map()))
    (tmp_path / "maps" / "shares" / "probabilities.zarr" / "zarr.json").write_text("{")
    (tmp_path / "maps" / "picture" / "thumbnail.jpg").write_bytes(b"no picture")
    (tmp_path / "maps" / "map" / "classes.ome.tif").write_bytes(b"no TIFF")
    with running(tmp_path / "maps", tmp_path / "slides") as server:
        shares = server.get("/api/slides/shares").json()
        assert shares["probabilities"] is False
        assert "probabilities" in shares["notes"][0]
        assert "thumbnail" in server.get("/api/slides/picture").json()["notes"][0]
        assert server.get("/slides/picture/thumbnail.jpg").status == 500
        answer = server.get("/api/slides/map")
        assert answer.status == 500
        assert b"predict" in answer.body
        assert answer.body.count(b"\n") == 1
        assert server.get("/api/slides/sound").json()["notes"] == []


def test_tile_that_cannot_be_read_is_an_answer(tmp_path):
    slide = write_slide(tmp_path / "slides" / "case7.png")
    path = write_map(tmp_path / "maps" / "one", slide) / "classes.ome.tif"
    with tifffile.TiffFile(path) as file:
        first = file.pages[0].dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[first : first + 8] = b"\xff" * 8
    path.write_bytes(data)
    with running(tmp_path / "maps", tmp_path / "slides") as server:
        answer = server.get("/slides/one/classes/11/0_0.png")
        assert answer.status == 500
        assert b"damaged" in answer.body
        assert server.get("/slides/one/classes/11/2_1.png").status == 200


def test_new_results_are_shown(tmp_path):
    slide = write_slide(tmp_path / "slides" / "case7.png")
    root = tmp_path / "maps"
    folder = write_map(root / "one", slide)
    with running(root, tmp_path / "slides") as server:
        before = server.get("/slides/one/classes/8/0_0.png").body
        slides = server.get("/api/slides").json()["slides"]
        again = write_map(tmp_path / "again", slide, classes=np.full((190, 300), STROMA, np.uint8))
        for name in ("classes.ome.tif", "slide.json"):
            (again / name).replace(folder / name)
        write_map(root / "three", slide)
        after = server.get("/api/slides").json()["slides"]
        assert [one["key"] for one in after] == ["one", "three"]
        assert after[0]["version"] != slides[0]["version"]
        assert server.get("/slides/one/classes/8/0_0.png").body != before
        colours = picture(server.get("/slides/one/classes/8/0_0.png"))
        assert {tuple(colour) for colour in colours[colours[..., 3] > 0][:, :3]} == {LABELS.colours[STROMA]}
