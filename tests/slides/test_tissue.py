import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage
from shapely.geometry import shape

from tissuehint.data import phantom_slide_tissue
from tissuehint.data.phantom_slide import write_phantom_slide
from tissuehint.data.phantom_slide_tissue import SlideTissue
from tissuehint.data.phantom_tissue import WHITE
from tissuehint.errors import InputError
from tissuehint.slides import tissue as tissue_module
from tissuehint.slides.coordinates import Box, Placement
from tissuehint.slides.reader import open_slide
from tissuehint.slides.tissue import OUTLINE, Tissue, TissueConfig, find_tissue

REAL = os.environ.get("TISSUEHINT_DATA")
GLASS, STAIN, PALE = (243, 243, 240), (190, 120, 170), (238, 222, 232)
# 1 pixel of the pictures below is 8 um, as is a pixel of the grid
PLAIN = TissueConfig(closing_um=0, hole_um2=0, min_area_um2=0, margin_um=0)


@pytest.fixture
def slide_of(tmp_path):
    """Opens pixels (H,W,3) as a slide of 8 um per pixel."""
    opened = []

    def make(pixels, um_per_px=8.0):
        path = tmp_path / f"{len(opened)}.png"
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
        opened.append(open_slide(path, um_per_px=um_per_px))
        return opened[-1]

    yield make
    for slide in opened:
        slide.close()


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    """A slide with bounds of 300 x 260 um and more."""
    path = tmp_path_factory.mktemp("slides") / "phantom.scn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom_slide_tissue, "TEXTURE", 256)
        write_phantom_slide(path, 901, 1203, seed=1, um_per_px=1.0, levels=(1, 4), margins=(50, 121, 70, 30))
        truth = SlideTissue.random(901, 1203, seed=1, um_per_px=1.0).classes(0, 0, 901, 1203) != WHITE
    with open_slide(path) as slide:
        yield slide, truth


def painted(*boxes, colour=STAIN, size=(120, 160), seed=0, noise=2.0):
    """Noisy glass with boxes (top, left, bottom, right) in a colour."""
    pixels = np.full((*size, 3), GLASS, float)
    for top, left, bottom, right in boxes:
        pixels[top:bottom, left:right] = colour
    return pixels + np.random.default_rng(seed).normal(0, noise, pixels.shape)


def test_the_phantoms_tissue_is_found(phantom):
    slide, truth = phantom
    tissue = find_tissue(slide)
    assert tissue.placement == Placement(8.0, 8.0, 50, 121)
    assert tissue.mask.shape == (113, 151)
    expected = np.pad(truth, ((0, 3), (0, 5)))[4::8, 4::8]
    both, either = (tissue.mask & expected).sum(), (tissue.mask | expected).sum()
    assert both / either > 0.9
    assert both / expected.sum() > 0.99


@pytest.mark.parametrize("noise", [0, 2, 5])
def test_glass_alone_has_no_tissue(slide_of, noise):
    tissue = find_tissue(slide_of(painted(noise=noise)))
    assert not tissue.mask.any()
    assert tissue.area_mm2 == 0
    assert tissue.share(Box(0, 0, 100, 100)) == 0
    assert not find_tissue(slide_of(np.full((50, 60, 3), 255))).mask.any()


@pytest.mark.parametrize("colour", [STAIN, (120, 70, 140), (235, 190, 210)])
def test_tissue_alone_is_all_tissue(slide_of, colour):
    pixels = painted((0, 0, 120, 160), colour=colour, noise=8)
    pixels[:, 80:] -= 15
    assert find_tissue(slide_of(pixels)).mask.all()


def test_grey_noise_is_no_tissue(slide_of):
    grey = np.random.default_rng(0).uniform(60, 255, (120, 160, 1)) * np.ones(3)
    assert not find_tissue(slide_of(grey)).mask.any()


def test_pale_tissue_on_glass(slide_of):
    tissue = find_tissue(slide_of(painted((30, 30, 90, 120), colour=PALE)), PLAIN)
    expected = np.zeros((120, 160), bool)
    expected[30:90, 30:120] = True
    assert (tissue.mask != expected).mean() < 0.02


def test_tinted_light_is_no_tissue(slide_of):
    pixels = painted((30, 30, 90, 120)) - (0, 5, 18)
    tissue = find_tissue(slide_of(pixels), PLAIN)
    assert tissue.mask.sum() == pytest.approx(60 * 90, rel=0.06)


@pytest.mark.parametrize("black", [0, 12, 40])
def test_a_black_frame_is_no_tissue(slide_of, black):
    pixels = painted((40, 40, 80, 120))
    for border in (np.s_[:15], np.s_[-9:], np.s_[:, :11], np.s_[:, -7:]):
        pixels[border] = black
    pixels += np.random.default_rng(1).normal(0, 4, pixels.shape)
    tissue = find_tissue(slide_of(pixels))
    assert tissue.mask[40:80, 40:120].all()
    assert not tissue.mask[:30].any()
    assert not tissue.mask[:, :30].any()
    assert not tissue.mask[90:].any()


@pytest.mark.parametrize("ink", [(40, 150, 70), (40, 80, 170), (30, 30, 35)])
def test_pen_is_no_tissue(slide_of, ink):
    clean = painted((40, 40, 80, 120))
    pixels = clean.copy()
    pixels[95:105, 10:150] = ink
    slide = slide_of(pixels)
    tissue = find_tissue(slide)
    assert not tissue.mask[90:110].any()
    assert tissue.mask[40:80, 40:120].all()
    np.testing.assert_array_equal(find_tissue(slide, PLAIN).mask, find_tissue(slide_of(clean), PLAIN).mask)
    if max(ink) > 50:
        assert find_tissue(slide, TissueConfig(ink=None)).mask[97:103, 20:140].all()


def test_large_dark_places_in_tissue_are_left_out_small_ones_filled(slide_of):
    pixels = painted((20, 20, 100, 140))
    pixels[30:50, 30:50] = pixels[70:74, 70:74] = 20
    mask = find_tissue(slide_of(pixels), TissueConfig(margin_um=0)).mask
    assert not mask[30:50, 30:50].any()
    assert mask[60:90, 60:90].all()


def test_blue_nuclei_are_no_pen(slide_of):
    assert find_tissue(slide_of(painted((40, 40, 80, 120), colour=(95, 75, 140)))).mask[40:80, 40:120].all()


def test_small_pieces_holes_and_gaps(slide_of):
    pixels = painted((20, 20, 60, 60), (90, 20, 94, 24), (20, 64, 60, 100), noise=0)
    pixels[30:36, 30:36] = GLASS  # 36 pixels
    pixels[40:56, 40:56] = GLASS  # 256 pixels
    slide = slide_of(pixels)
    pixel = 64.0
    plain = find_tissue(slide, PLAIN).mask
    assert plain[92, 22]
    assert not plain[33, 33]
    assert not plain[40, 62]
    assert not find_tissue(slide, PLAIN.model_copy(update={"min_area_um2": 60 * pixel})).mask[92, 22]
    filled = find_tissue(slide, PLAIN.model_copy(update={"hole_um2": 100 * pixel})).mask
    assert filled[30:36, 30:36].all()
    assert not filled[48, 48]
    closed = find_tissue(slide, PLAIN.model_copy(update={"closing_um": 3 * 8.0})).mask
    assert closed[22:58, 60:64].all()
    assert not closed[48, 48]
    grown = find_tissue(slide, PLAIN.model_copy(update={"margin_um": 5 * 8.0})).mask
    near = ndimage.distance_transform_edt(~plain) <= 5
    np.testing.assert_array_equal(grown, near)


def test_white_around_the_scan_is_not_its_light(slide_of):
    pixels = np.full((120, 160, 3), 255.0)
    pixels[30:90, 30:100] = np.array((243, 239, 228)) + np.random.default_rng(0).normal(0, 1, (60, 70, 3))
    assert not find_tissue(slide_of(pixels)).mask.any()


def test_strips_do_not_show(slide_of, monkeypatch):
    slide = slide_of(painted((20, 20, 100, 100)))
    whole = find_tissue(slide, PLAIN).mask
    monkeypatch.setattr(tissue_module, "STRIP", 7)
    np.testing.assert_array_equal(find_tissue(slide, PLAIN).mask, whole)


def test_closing_at_the_border(slide_of):
    mask = find_tissue(slide_of(painted((0, 20, 60, 60), (0, 64, 60, 100))), TissueConfig(margin_um=0)).mask
    assert mask[:58, 22:98].all()


def test_closing_keeps_tissue_at_the_border(slide_of):
    tissue = find_tissue(slide_of(painted((0, 0, 60, 160))), TissueConfig(margin_um=0))
    assert tissue.mask[:58].all()
    assert not tissue.mask[62:].any()


def test_a_fixed_threshold(slide_of):
    slide = slide_of(painted((30, 30, 90, 120), colour=PALE))
    assert find_tissue(slide, TissueConfig(threshold=0.01)).mask.any()
    assert not find_tissue(slide, TissueConfig(threshold=0.1)).mask.any()


def test_the_grid_is_bounded(slide_of):
    slide = slide_of(painted((40, 40, 80, 120)), um_per_px=4.0)
    tissue = find_tissue(slide, TissueConfig(longest=40))
    assert tissue.placement.scale == 4
    assert tissue.mask.shape == (30, 40)
    assert tissue.area_mm2 == pytest.approx(40 * 80 * 16e-6, rel=0.4)
    assert find_tissue(slide).mask.shape == (60, 80)


def test_pixel_size_is_needed(tmp_path):
    Image.fromarray(painted().astype(np.uint8)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide, pytest.raises(InputError, match="--mpp"):
        find_tissue(slide)


def of_mask(mask, scale=4.0, top=-3.0, left=10.0):
    height, width = mask.shape
    return Tissue(mask, Placement(2.0, scale, top, left), Box(top, left, height * scale, width * scale))


MASKS = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(MASKS, st.data())
@settings(max_examples=60)
def test_share_is_exact(mask, data):
    """Boxes on quarters of map pixels, against counting quarter pixels."""
    tissue, fine = of_mask(mask), np.pad(mask.repeat(4, 0).repeat(4, 1), 20)
    rows = sorted(data.draw(st.lists(st.integers(-20, mask.shape[0] * 4 + 19), min_size=2, max_size=2, unique=True)))
    columns = sorted(data.draw(st.lists(st.integers(-20, mask.shape[1] * 4 + 19), min_size=2, max_size=2, unique=True)))
    expected = fine[rows[0] + 20 : rows[1] + 20, columns[0] + 20 : columns[1] + 20].mean()
    box = tissue.placement.box(rows[0] / 4, columns[0] / 4, (rows[1] - rows[0]) / 4, (columns[1] - columns[0]) / 4)
    assert tissue.share(box) == pytest.approx(expected, abs=1e-7)


def test_shares_of_many_boxes():
    tissue = of_mask(np.random.default_rng(0).random((30, 40)) < 0.5)
    tops, lefts = np.linspace(-20, 100, 7)[:, None], np.linspace(-30, 150, 9)[None, :]
    shares = tissue.shares(tops, lefts, 33.3, 21.7)
    assert shares.shape == (7, 9)
    for row, top in enumerate(tops[:, 0]):
        for column, left in enumerate(lefts[0]):
            assert shares[row, column] == tissue.share(Box(top, left, 33.3, 21.7))


def test_places_on_tissue():
    tissue = of_mask(np.random.default_rng(1).random((9, 12)) < 0.5)
    rows, columns = np.linspace(-9.3, 41.2, 23), np.linspace(3.1, 66.6, 31)
    found = tissue.at(rows, columns)
    expected = tissue.shares(rows[:, None] - 1e-4, columns[None, :] - 1e-4, 2e-4, 2e-4)
    np.testing.assert_array_equal(found, expected > 0.5)


def test_nothing_is_nothing_and_all_is_all():
    mask = np.zeros((3000, 3000), bool)
    mask[:, :1500] = True
    tissue = of_mask(mask, scale=16.03)
    places = np.random.default_rng(0).uniform(0, 20_000, (2, 500))
    assert (tissue.shares(places[0], places[1] + 25_000, 300, 250) == 0).all()
    assert (tissue.shares(places[0], places[1] + 100, 300, 250) == 1).all()


def test_area():
    mask = np.zeros((50, 60), bool)
    mask[:20, :30] = True
    assert of_mask(mask).area_mm2 == pytest.approx(600 * 4e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.sampled_from(["slide", "bounds"]))
@settings(max_examples=40)
def test_geojson_gives_the_mask_back(phantom, tmp_path_factory, seed, share, origin):
    slide, _ = phantom
    mask = np.random.default_rng(seed).random((12, 16)) < share
    config = TissueConfig(um_per_px=76)
    grid = find_tissue(slide, config)
    assert grid.mask.shape == (12, 16)
    path = tmp_path_factory.getbasetemp() / "round_trip.geojson"
    mask[3, 4] = True
    tissue = Tissue(mask, grid.placement, grid.bounds)
    tissue.to_geojson(path, origin)
    back = Tissue.from_geojson(path, slide, config, origin)
    np.testing.assert_array_equal(back.mask, mask)
    assert (back.placement, back.bounds) == (grid.placement, grid.bounds)
    polygons = [shape(feature["geometry"]) for feature in json.loads(path.read_text())["features"]]
    assert all(polygon.is_valid for polygon in polygons)
    assert len(polygons) == ndimage.label(mask)[1]
    assert sum(polygon.area for polygon in polygons) == pytest.approx(mask.sum() * 76**2)
    bounds = np.array([polygon.bounds for polygon in polygons])
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    corner = (0, 0) if origin == "bounds" else (50, 121)
    assert bounds[:, 1].min() == pytest.approx(corner[0] + rows[0] * 76)
    assert bounds[:, 2].max() == pytest.approx(corner[1] + (columns[-1] + 1) * 76)


def test_geojson_is_what_qupath_reads(slide_of, tmp_path):
    tissue = find_tissue(slide_of(painted((20, 20, 60, 60), (80, 80, 110, 150))))
    tissue.to_geojson(tmp_path / "tissue.geojson")
    content = json.loads((tmp_path / "tissue.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    assert len(content["features"]) == 2
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Tissue"
    of_mask(np.zeros((3, 3), bool)).to_geojson(tmp_path / "empty.geojson")
    assert json.loads((tmp_path / "empty.geojson").read_text())["features"] == []


def square(top, left, side):
    return [[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]


def feature(coordinates, name=None, kind="Polygon"):
    properties = {"classification": {"name": name}} if name else {}
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def test_edited_annotations(slide_of, tmp_path):
    slide = slide_of(painted())
    features = [
        feature([square(10, 10, 40), square(20, 20, 10)], "Tissue"),
        feature([square(90, 10, 20)]),
        feature([[square(60, 100, 10)], [square(60, 130, 10)]], "Tissue", "MultiPolygon"),
        feature([square(60, 60, 30)], "Tumor"),
        feature([5, 5], "Tissue", "Point"),
        {"type": "Feature", "geometry": None, "properties": None},
    ]
    expected = np.zeros((120, 160), bool)
    expected[10:50, 10:50] = True
    expected[20:30, 20:30] = False
    expected[90:110, 10:30] = True
    expected[60:70, 100:110] = expected[60:70, 130:140] = True
    path = tmp_path / "edited.geojson"
    for content in ({"type": "FeatureCollection", "features": features}, features):
        path.write_text("\ufeff" + json.dumps(content), encoding="utf-8")
        np.testing.assert_array_equal(Tissue.from_geojson(path, slide).mask, expected)
    path.write_text(json.dumps(features[1]))
    assert Tissue.from_geojson(path, slide).mask.sum() == 400
    path.write_bytes(gzip.compress(json.dumps(features).encode()))
    np.testing.assert_array_equal(Tissue.from_geojson(path, slide).mask, expected)


def test_derived_classes_are_others(slide_of, tmp_path):
    """QuPath writes Tumor: Positive as a list of names."""
    derived = feature([square(60, 60, 30)]) | {"properties": {"classification": {"names": ["Tumor", "Positive"]}}}
    (tmp_path / "a.geojson").write_text(json.dumps([feature([square(10, 10, 40)], "Tissue"), derived]))
    assert Tissue.from_geojson(tmp_path / "a.geojson", slide_of(painted())).mask.sum() == 1600


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "does not exist"),
        ("{", "is no JSON"),
        ("\udcff", "is not UTF-8"),
        ("3", "is no FeatureCollection"),
        ('{"type": "FeatureCollection"}', "is no FeatureCollection"),
        ("[]", r"no polygon of class Tissue or without class \(0 of other"),
        ([feature([square(0, 0, 9)], "Tumor")], r"\(1 of other classes\)"),
        ([feature([[5, 5]], kind="LineString")], "no polygon"),
        ([feature([square(0, 0, 9)]), feature([[[0, 0], [1, 1], [0, 0]]])], "feature 2: has the ring"),
        ([feature([[[0, 0], [1, "x"], [1, 1], [0, 0]]])], "feature 1: has the ring"),
        ([feature([[[0, 0], [1, float("nan")], [1, 1], [0, 0]]])], "feature 1: has the ring"),
        ([feature([7])], "feature 1: has the ring"),
        ([feature([])], "without coordinates"),
        ([feature(None, kind="MultiPolygon")], "without coordinates"),
        ([feature([square(900, 900, 50)])], "has 1 polygons, all beside the slide of 120 x 160"),
    ],
)
def test_bad_geojson(slide_of, tmp_path, content, part):
    path = tmp_path / "bad.geojson"
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"bad\.geojson.*" + part):
        Tissue.from_geojson(path, slide_of(painted()))


def test_picture_shows_the_outline(slide_of):
    pixels = painted((20, 20, 80, 100), noise=0)
    slide = slide_of(pixels)
    tissue = find_tissue(slide, PLAIN)
    picture = tissue.picture(slide)
    assert picture.shape == (120, 160, 3)
    outline = (picture == OUTLINE).all(2)
    np.testing.assert_array_equal(outline, tissue.mask & ~ndimage.binary_erosion(tissue.mask))
    np.testing.assert_array_equal(picture[~outline], np.clip(pixels, 0, 255).astype(np.uint8)[~outline])
    assert tissue.picture(slide, 80).shape == (60, 80, 3)


@pytest.mark.skipif(REAL is None, reason="TISSUEHINT_DATA is not set: no real slides")
@pytest.mark.parametrize(
    ("name", "um_per_px", "inside", "outside", "area"),
    [
        ("CMU-1-Small-Region.svs", None, (1500, 1000), (300, 2000), 0.7),
        ("tcga-cr-7395-01a-01-ts1.svs", 0.25, (1800, 3000), (3400, 200), 0.7),
    ],
)
def test_real_slides(name, um_per_px, inside, outside, area):
    with open_slide(Path(REAL) / "slides" / name, um_per_px=um_per_px) as slide:
        tissue = find_tissue(slide)
        assert tissue.share(Box(*inside, 64, 64)) == 1
        assert tissue.share(Box(*outside, 64, 64)) == 0
        assert tissue.area_mm2 == pytest.approx(area, rel=0.1)
