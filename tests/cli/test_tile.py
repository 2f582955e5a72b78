"""``tissuehint data tile``: patches of slides with the hints of QuPath annotations."""

import csv
import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from tissuehint.data.folder import read_folder
from tissuehint.data.phantom_slide import write_phantom_slide
from tissuehint.data.records import read_codes

COLOURS = {"a": (200, 60, 120), "b": (90, 40, 160)}


def region(name, left, top, right, bottom, kind="Polygon"):
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


def points(name, *places):
    geometry = {"type": "MultiPoint", "coordinates": [list(place) for place in places]}
    return {"type": "Feature", "geometry": geometry, "properties": {"classification": {"name": name}}}


def write(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))


@pytest.fixture
def scans(tmp_path):
    """A slide of 256 x 384 px at 0.5 um: all tissue, left half of colour a, right half of colour b."""
    folder = tmp_path / "scans"
    folder.mkdir()
    pixels = np.zeros((256, 384, 3), np.uint8)
    pixels[:, :192], pixels[:, 192:] = COLOURS["a"], COLOURS["b"]
    per_cm = 1e4 / 0.5
    tifffile.imwrite(
        folder / "one.tif", pixels, tile=(64, 64), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit=3
    )
    write(folder / "one.geojson", region("a", 0, 0, 192, 256), region("b", 192, 0, 384, 256), points("a", (70.5, 10.2)))
    return folder


@pytest.fixture
def tile(command, scans, tmp_path):
    out = tmp_path / "cut"

    def call(*words, annotations=True):
        extra = ["--annotations", scans] if annotations else []
        return command("data", "tile", scans / "one.tif", "--out", out, *extra, "--tissue", "threshold=0.05", *words)

    call.out = out
    return call


def rows(folder):
    with (folder / "labels.csv").open(newline="") as file:
        return {row["image"]: row for row in csv.DictReader(file)}


def test_patches_are_pixels_of_the_slide(tile, command):
    outcome = tile("--um-per-px", 0.5, "--side", 64)
    assert outcome.code == 0, outcome.err
    found = rows(tile.out)
    assert len(found) == 4 * 6
    for name, row in found.items():
        image = np.asarray(Image.open(tile.out / "images" / name))
        left = int(name.split("_c")[1].split(".")[0])
        assert (image == COLOURS["a" if left < 192 else "b"]).all()
        assert (row["group"], row["split"], float(row["um_per_px"])) == ("one", "train", 0.5)
        present = "a" if left < 192 else "b"
        assert [row["tag:a"], row["tag:b"]] == (["1", "0"] if present == "a" else ["0", "1"])
        assert float(row[f"proportion:{present}"]) == 1
    assert command("data", "check", tile.out).code == 0


def test_proportions_are_areas_at_the_asked_pixel_size(tile):
    """Patches of 80 px at 1 um: 160 px of the slide; the second one lies across the border at 192."""
    assert tile("--um-per-px", 1, "--side", 80, "--stride", 56, "--masks").code == 0
    found = rows(tile.out)
    across = found["one/r0_c112.png"]
    assert float(across["proportion:a"]) == pytest.approx(80 / 160)
    assert float(across["proportion:b"]) == pytest.approx(80 / 160)
    assert (across["tag:a"], across["tag:b"]) == ("1", "1")
    mask = read_codes(tile.out / "masks" / "one" / "r0_c112.png")
    assert (mask[:, :40] == 0).all()
    assert (mask[:, 40:] == 1).all()
    assert Image.open(tile.out / "images" / "one" / "r0_c112.png").size == (80, 80)


def test_points_stay_points(tile):
    assert tile("--um-per-px", 1, "--side", 32, "--hints", "points").code == 0
    (record,) = read_folder(tile.out).splits["train"]
    assert record.id == "one__r0_c64"
    assert record.points.rows.tolist() == [[5, 3, 0]]  # (10.2, 70.5 - 64) of the slide, halved
    assert record.tags is None


def test_a_part_that_is_not_annotated_has_no_tags(tile, scans):
    write(scans / "one.geojson", region("a", 0, 0, 100, 256), region("b", 0, 0, 1, 1))
    assert tile("--um-per-px", 0.5, "--side", 64).code == 0
    assert {name.split("_c")[1] for name in rows(tile.out)} == {"0.png"}  # 64..128 is annotated to 36 of 64
    assert tile("--um-per-px", 0.5, "--side", 64, "--unlabelled", "--out", tile.out / "all").code == 0
    assert len(rows(tile.out / "all")) == 24


def test_without_annotations(tile):
    assert tile("--um-per-px", 0.5, "--side", 128, annotations=False).code == 0
    assert len(rows(tile.out)) == 6


def test_annotations_measure_from_the_bounds(command, tmp_path, monkeypatch):
    from tissuehint.data import phantom_slide_tissue

    monkeypatch.setattr(phantom_slide_tissue, "TEXTURE", 96)
    write_phantom_slide(tmp_path / "m.scn", 256, 256, margins=(100, 60, 20, 20), blank=0.0)
    write(tmp_path / "m.geojson", region("x", 0, 0, 64, 64))
    for origin, place in (("bounds", "r100_c60"), ("slide", None)):
        out = tmp_path / origin
        words = ["--um-per-px", 0.5, "--side", 64, "--annotations", tmp_path, "--origin", origin, "--min-tissue", 0.0]
        outcome = command("data", "tile", tmp_path / "m.scn", "--out", out, *words, "--annotated", 0.6)
        if place is None:  # 64 px from the corner of the slide lie on the glass around the scan
            assert outcome.code == 2
        else:
            assert outcome.code == 0, outcome.err
            assert list(rows(out)) == [f"m/{place}.png"]


def test_a_bad_slide_is_left_out(command, scans, tmp_path):
    (scans / "bad.svs").write_text("no slide")
    out = tmp_path / "cut"
    words = ["--um-per-px", 0.5, "--side", 64, "--annotations", scans, "--tissue", "threshold=0.05"]
    outcome = command("data", "tile", scans, "--out", out, *words)
    assert outcome.code == 2
    assert "bad.svs" in outcome.err
    assert "Traceback" not in outcome.err
    assert len(rows(out)) == 24


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--um-per-px", 0], ("um_per_px",)),
        (["--um-per-px", 0.5, "--split", "all"], ("--split all",)),
        (["--um-per-px", 0.5, "--hints", "tags,masks"], ("masks",)),
        (["--um-per-px", 0.5, "--annotations", "nowhere"], ("nowhere", "does not exist")),
        (["--um-per-px", 0.5, "--origin", "corner"], ("origin",)),
        (["--um-per-px", 0.5, "--side", 2000], ("no patch",)),
    ],
)
def test_what_cannot_be_done(tile, words, said):
    outcome = tile(*words, annotations="--annotations" not in words)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert all(word in outcome.err for word in said), outcome.err
    assert not tile.out.exists()
