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


def write_slide(path, pixels):
    """At 0.5 um per px."""
    per_cm = 1e4 / 0.5
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", resolution=(per_cm, per_cm), resolutionunit=3)


@pytest.fixture
def scans(tmp_path):
    """A slide of 256 x 384 px at 0.5 um: all tissue, left half of colour a, right half of colour b."""
    folder = tmp_path / "scans"
    folder.mkdir()
    pixels = np.zeros((256, 384, 3), np.uint8)
    pixels[:, :192], pixels[:, 192:] = COLOURS["a"], COLOURS["b"]
    write_slide(folder / "one.tif", pixels)
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


@pytest.fixture
def tile_folder(command, scans, tmp_path):
    """All slides of the folder, patches of 64 px."""
    out = tmp_path / "cut"

    def call(*extra):
        words = ["--um-per-px", 0.5, "--side", 64, "--annotations", scans, "--tissue", "threshold=0.05", *extra]
        return command("data", "tile", scans, "--out", out, *words)

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


def test_a_bad_slide_is_left_out(tile_folder, scans):
    (scans / "bad.svs").write_text("no slide")
    outcome = tile_folder()
    assert outcome.code == 2
    assert "bad.svs" in outcome.err
    assert "Traceback" not in outcome.err
    assert len(rows(tile_folder.out)) == 24


def test_a_slide_that_breaks_in_the_middle_leaves_nothing(tile_folder, scans, monkeypatch):
    from tissuehint.slides.reader import Slide

    (scans / "two.tif").write_bytes((scans / "one.tif").read_bytes())
    (scans / "two.geojson").write_bytes((scans / "one.geojson").read_bytes())
    whole = Slide.read

    def read(self, box, um_per_px):
        if self.name == "two" and box.top > 100:
            raise OSError("a tile is damaged")
        return whole(self, box, um_per_px)

    monkeypatch.setattr(Slide, "read", read)
    outcome = tile_folder("--masks")
    assert outcome.code == 2
    assert "two.tif: a tile is damaged" in outcome.err
    assert len(rows(tile_folder.out)) == 24
    assert not (tile_folder.out / "images" / "two").exists()
    assert not (tile_folder.out / "masks" / "two").exists()


def test_an_export_that_is_damaged_stops_no_other_slide(tile_folder, scans):
    (scans / "two.tif").write_bytes((scans / "one.tif").read_bytes())
    (scans / "two.geojson").write_text("{")
    outcome = tile_folder()
    assert outcome.code == 2
    assert "1 of 2 slides were left out" in outcome.err
    assert "two.geojson" in outcome.err
    assert len(rows(tile_folder.out)) == 24


def test_one_drawing_is_for_one_slide(command, scans, tmp_path):
    (scans / "two.tif").write_bytes((scans / "one.tif").read_bytes())
    outcome = command(
        "data", "tile", scans, "--out", tmp_path / "cut", "--um-per-px", 0.5, "--annotations", scans / "one.geojson"
    )
    outcome.refused("one.geojson", "the drawing of one slide, there are 2", "folder of exports")


def test_what_regions_cover_of_the_glass_says_nothing(tile, scans):
    """The slide is white from column 128 on; b is drawn over the glass as well, and over a strip of tissue."""
    pixels = np.full((256, 384, 3), 255, np.uint8)
    pixels[:, :128] = COLOURS["a"]
    write_slide(scans / "one.tif", pixels)
    write(scans / "one.geojson", region("b", 64, 0, 384, 256), region("a", 0, 0, 112, 256))
    words = ["--um-per-px", 0.5, "--side", 128, "--stride", 64, "--min-tissue", 0.2]
    exact = [word for key in ("closing_um", "margin_um", "min_area_um2") for word in ("--tissue", f"{key}=0")]
    outcome = tile(*words, *exact)
    assert outcome.code == 0, outcome.err
    found = rows(tile.out)
    # 16 of the 64 columns of tissue, found to within some pixels; of all that is drawn it is 80 of 128
    assert 0.2 < float(found["one/r0_c64.png"]["proportion:b"]) < 0.45


def test_regions_of_other_classes_cover_what_lies_below(tile, scans):
    other = region("c", 0, 0, 48, 256), points("c", (5, 5)), region("", 0, 0, 300, 200)
    write(scans / "one.geojson", region("a", 0, 0, 384, 256), *other)
    outcome = tile("--um-per-px", 0.5, "--side", 64, "--classes", "a,b", "--masks")
    assert outcome.code == 0, outcome.err
    assert "not used: 2 of c, 1 of no class" in outcome.err
    assert "one/r0_c0.png" not in rows(tile.out)  # what is known of it is too little
    assert "one/r0_c64.png" in rows(tile.out)
    assert (
        tile(
            "--um-per-px", 0.5, "--side", 64, "--classes", "a,b", "--masks", "--annotated", 0.1, "--out", tile.out / "b"
        ).code
        == 0
    )
    mask = read_codes(tile.out / "b" / "masks" / "one" / "r0_c0.png")
    assert (mask[:, :48] == 255).all()
    assert (mask[:, 48:] == 0).all()


def test_points_of_one_pixel_are_one_point(tile, scans, command):
    """That which is nearest to its centre; a pixel of two classes would be refused by whoever reads the data."""
    write(scans / "one.geojson", points("a", (10, 10), (30, 30), (31, 31)), points("b", (13, 12)))
    outcome = tile("--um-per-px", 4, "--side", 16, "--hints", "points")
    assert outcome.code == 0, outcome.err
    (record,) = read_folder(tile.out).splits["train"]
    assert record.points.rows.tolist() == [[1, 1, 1], [3, 3, 0]]
    assert command("data", "check", tile.out).code == 0


def test_patches_finer_than_the_slide_have_names_of_their_own(tile, command):
    outcome = tile("--um-per-px", 0.2, "--side", 64, "--stride", 47)
    assert outcome.code == 0, outcome.err
    found = rows(tile.out)
    assert len(found) == len(list((tile.out / "images").rglob("*.png"))) > 100
    assert "one/r18.8_c0.png" in found
    assert command("data", "check", tile.out).code == 0


def test_names_of_classes_are_taken_as_they_are_meant(tile, scans, command):
    write(scans / "one.geojson", region("a ", 0, 0, 192, 256), region("b; b; b; b; b; b", 192, 0, 384, 256))
    assert tile("--um-per-px", 0.5, "--side", 64).code == 0
    assert command("data", "check", tile.out).code == 0
    labels = read_folder(tile.out).labels
    assert labels.names == ("a", "b; b; b; b; b; b")


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
