from __future__ import annotations

import io

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.slides.view.predicted import LABELS, write_map, write_pyramid
from tissuehint.errors import InputError
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.export.ome_tiff import write_ome_tiff
from tissuehint.slides.view.class_map import ClassMap, png
from tissuehint.slides.view.collection import Collection
from tissuehint.slides.view.pyramid import TILE, Pyramid, Tile


def opened(folder, classes, placement, size, **options) -> ClassMap:
    write_map(folder, folder / "absent.svs", classes=classes, placement=placement, size=size)
    write_pyramid(folder / "classes.ome.tif", classes, **options)
    record = Collection(folder).records()[0]
    return ClassMap(folder / "classes.ome.tif", record.geometry)


@st.composite
def cases(draw):
    """A map of any size and place, and a tile of the slide."""
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    scale = draw(st.floats(0.3, 9))
    placement = Placement(scale, scale, draw(st.floats(-50, 300)), draw(st.floats(-50, 300)))
    tile = Tile(*(draw(st.integers(0, 400)) for _ in range(2)), *(draw(st.integers(1, 60)) for _ in range(2)), 1)
    return height, width, placement, tile, draw(st.sampled_from([16, 32, 64])), draw(st.integers(0, 99))


@given(cases())
@settings(max_examples=40)
def test_tile_is_the_class_under_each_centre(tmp_path_factory, case):
    height, width, placement, tile, side, seed = case
    classes = np.random.default_rng(seed).integers(0, 3, (height, width)).astype(np.uint8)
    found = opened(tmp_path_factory.mktemp("map") / "one", classes, placement, (2000, 2000), tile=side)
    expected = np.full((tile.rows, tile.columns), 255)
    for row in range(tile.rows):
        for column in range(tile.columns):
            y = int(np.floor((tile.top + row + 0.5 - placement.top) / placement.scale))
            x = int(np.floor((tile.left + column + 0.5 - placement.left) / placement.scale))
            if 0 <= y < height and 0 <= x < width:
                expected[row, column] = classes[y, x]
    if placement.scale > 0.5:  # a finer map gives its next level
        np.testing.assert_array_equal(found.tile(tile), expected)
    assert found.at(tile.top + 0.5, tile.left + 0.5) == expected[0, 0]


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize(("size", "scale"), [((513, 701), 1.0), ((641, 515), 0.9), ((903, 65), 0.9)])
def test_coarse_tiles_come_from_the_level_that_fits(tmp_path, size, scale, factor, drop):
    """Every level is worth its own number here, so that the level that was read shows itself.

    Some pyramids drop the last pixels of an odd size.
    """
    levels = [np.zeros(size, np.uint8)]
    while max(levels[-1].shape) > 32:
        height, width = (max(1, side // factor if drop else -(-side // factor)) for side in levels[-1].shape)
        levels.append(np.full((height, width), len(levels), np.uint8))
    placement = Placement(scale, scale)
    shape = (round(size[0] * scale), round(size[1] * scale))
    write_map(tmp_path / "one", tmp_path / "absent.svs", classes=levels[0], placement=placement, size=shape)
    with tifffile.TiffWriter(tmp_path / "one" / "classes.ome.tif") as file:
        for index, level in enumerate(levels):
            subifds = len(levels) - 1 if index == 0 else None
            file.write(level, tile=(64, 64), photometric="minisblack", subifds=subifds, subfiletype=int(index > 0))
    record = Collection(tmp_path / "one").records()[0]
    found = ClassMap(tmp_path / "one" / "classes.ome.tif", record.geometry)
    pyramid = Pyramid(*shape)
    for level in range(pyramid.first, pyramid.last + 1):
        step = 2 ** (pyramid.last - level)
        last = (shape[0] - 1) // step // TILE, (shape[1] - 1) // step // TILE
        fits = [index for index, one in enumerate(levels) if factor**index * scale <= step and max(one.shape) >= 64]
        for place in ((0, 0), last):
            tile = pyramid.tile(level, *place)
            rows, columns = placement.to_map(*tile.centres())
            inside = found.tile(tile)[np.ix_(rows < size[0], columns < size[1])]
            assert inside.size or place == last
            assert (inside == (fits or [0])[-1]).all(), (level, tile)


def test_coarse_tile_is_at_its_place(tmp_path):
    classes = np.zeros((1030, 770), np.uint8)
    classes[512:768, 256:512] = 1
    found = opened(tmp_path / "one", classes, Placement(1.0, 1.0), (1030, 770))
    tile = Pyramid(1030, 770).tile(8, 0, 0)
    assert (tile.step, tile.rows, tile.columns) == (8, 129, 97)
    expected = np.zeros((129, 97), np.uint8)
    expected[64:96, 32:64] = 1
    # the last pixels have their centres beside the map
    np.testing.assert_array_equal(found.tile(tile)[:128, :96], expected[:128, :96])


def test_map_that_predict_wrote(tmp_path):
    classes = np.full((700, 900), 255, np.uint8)
    classes[128:512, 256:640] = 1
    placement = Placement(1.0, 1.0)
    folder = write_map(tmp_path / "one", tmp_path / "absent.svs", classes=classes, placement=placement, size=(700, 900))
    write_ome_tiff(folder / "classes.ome.tif", classes, LABELS, placement, tile=64)
    record = Collection(folder).records()[0]
    found = ClassMap(folder / "classes.ome.tif", record.geometry)
    assert [level.factor for level in found.levels] == [1, 2, 4, 8]
    pyramid = Pyramid(700, 900)
    for level in range(pyramid.first, pyramid.last + 1):
        tile = pyramid.tile(level, 0, 0)
        expected = classes[tile.step // 2 :: tile.step, tile.step // 2 :: tile.step]
        values = found.tile(tile)[: expected.shape[0], : expected.shape[1]]
        np.testing.assert_array_equal(values, expected[: values.shape[0], : values.shape[1]])


def test_map_of_another_size_or_kind_is_refused(tmp_path):
    for name, classes in (("size", np.zeros((30, 40), np.uint8)), ("kind", np.zeros((50, 60), np.uint16))):
        write_map(tmp_path / name, tmp_path / "absent.svs", classes=np.zeros((50, 60), np.uint8), size=(100, 100))
        write_pyramid(tmp_path / name / "classes.ome.tif", classes)
        record = Collection(tmp_path / name).records()[0]
        with pytest.raises(InputError, match="predict"):
            ClassMap(tmp_path / name / "classes.ome.tif", record.geometry)


def test_decoded_tiles_are_kept_within_bounds(tmp_path, monkeypatch):
    from tissuehint.slides.view import class_map

    monkeypatch.setattr(class_map, "KEPT", 3 * 64 * 64)
    classes = np.random.default_rng(0).integers(0, 3, (400, 400)).astype(np.uint8)
    found = opened(tmp_path / "one", classes, Placement(1.0, 1.0), (400, 400))
    np.testing.assert_array_equal(found.tile(Tile(0, 0, 256, 256, 1)), classes[:256, :256])
    np.testing.assert_array_equal(found.tile(Tile(100, 100, 256, 256, 1)), classes[100:356, 100:356])
    assert 0 < found._segments.bytes <= 3 * 64 * 64


@given(st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=50)
def test_tiles_of_a_level_cover_the_slide_once(height, width):
    pyramid = Pyramid(height, width)
    assert pyramid.tile(pyramid.first, 0, 1) is None or pyramid.first == pyramid.last
    for level in range(pyramid.first, pyramid.last + 1):
        step = 2 ** (pyramid.last - level)
        columns = [tile for column in range(20) if (tile := pyramid.tile(level, 0, column))]
        rows = [tile for row in range(20) if (tile := pyramid.tile(level, row, 0))]
        assert [tile.left for tile in columns] == [index * TILE * step for index in range(len(columns))]
        assert sum(tile.columns for tile in columns) == -(-width // step)
        assert sum(tile.rows for tile in rows) == -(-height // step)


def test_colours_beyond_the_classes_are_never_painted(tmp_path):
    classes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    shown = np.asarray(Image.open(io.BytesIO(png(classes, LABELS, set(range(256))))).convert("RGBA"))
    assert (shown[..., 3] > 0).sum() == LABELS.num_tissue
