from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.slides.export.maps import LABELS, Watched, blobs
from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.export import overlay
from tissuehint.slides.export.areas import AreaRow
from tissuehint.slides.export.class_map import windows
from tissuehint.slides.export.overlay import classes_of_thumbnail, legend, write_overlay

SLIDE = (3000, 4000)


def map_of_square(placement: Placement, shape: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """Stroma where the centre of a map pixel lies in the square (top, left, bottom, right) of level-0 pixels."""
    rows, columns = placement.to_slide(np.arange(shape[0]) + 0.5, np.arange(shape[1]) + 0.5)
    top, left, bottom, right = box
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    return np.where(inside, 1, 255).astype(np.uint8)


class TestRegistration:
    @given(
        st.floats(0.9, 60),
        st.tuples(st.floats(-200, 700), st.floats(-200, 700)),
        st.tuples(st.integers(40, 320), st.integers(40, 420)),
        st.tuples(st.floats(800, 1500), st.floats(800, 2000)),
    )
    def test_a_square_lies_where_it_is_on_the_slide(self, scale, start, thumbnail_shape, corner):
        placement = Placement(1.0, scale, *start)
        shape = tuple(int((extent - begin) / scale) for extent, begin in zip(SLIDE, start, strict=True))
        box = corner[0], corner[1], corner[0] + 900.0, corner[1] + 1100.0
        classes = map_of_square(placement, shape, box)
        found = classes_of_thumbnail(classes, LABELS, placement, SLIDE, thumbnail_shape)
        assert found.shape == thumbnail_shape
        for axis, count, extent, scaled in zip((1, 0), thumbnail_shape, SLIDE, (0, 1), strict=True):
            covered = np.flatnonzero((found == 1).any(axis))
            expected = np.array(box[scaled::2]) * count / extent
            # half a pixel for the majority, an eighth for its places; the map knows the square to half of its own pixel
            allowed = 0.625 + 0.5 * scale * count / extent + 1e-9
            assert abs(covered[0] - expected[0]) <= allowed
            assert abs(covered[-1] + 1 - expected[1]) <= allowed
            assert len(covered) == covered[-1] - covered[0] + 1

    def test_every_pixel_of_a_thumbnail_at_the_size_of_the_map(self):
        values = np.where(blobs(60) == 3, 255, blobs(60)).astype(np.uint8)
        found = classes_of_thumbnail(values, LABELS, Placement(1.0, 7.5), (450, 450), (60, 60))
        assert (found == values).all()
        finer = classes_of_thumbnail(values, LABELS, Placement(1.0, 7.5), (450, 450), (180, 120))
        assert (finer == values.repeat(3, 0).repeat(2, 1)).all()

    def test_nothing_is_shifted(self):
        # a half turn of map and slide about their common centre gives the half turn of the result
        values = blobs(101)
        placement = Placement(1.0, 2.3713, (400 - 101 * 2.3713) / 2, (500 - 101 * 2.3713) / 2)
        found = classes_of_thumbnail(values, LABELS, placement, (400, 500), (90, 110))
        turned = classes_of_thumbnail(values[::-1, ::-1], LABELS, placement, (400, 500), (90, 110))
        assert (found != 255).sum() > 2000
        assert (turned[::-1, ::-1] == found).all()

    def test_outside_the_map_nothing_is_mapped(self):
        values = np.ones((10, 10), np.uint8)
        found = classes_of_thumbnail(values, LABELS, Placement(1.0, 4.0, 40.0, 20.0), (100, 100), (25, 25))
        expected = np.full((25, 25), 255)
        expected[10:20, 5:15] = 1
        assert (found == expected).all()
        beyond = classes_of_thumbnail(values, LABELS, Placement(1.0, 4.0, 400.0, 20.0), (100, 100), (25, 25))
        assert (beyond == 255).all()

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("side", [1, 7, 2048])
    def test_the_most_frequent_class_wins(self, seed, side, monkeypatch):
        monkeypatch.setattr(overlay, "windows", partial(windows, side=side))
        values = np.random.default_rng(seed).choice(np.array([0, 1, 2, 3, 255], np.uint8), (20, 24))
        found = classes_of_thumbnail(values, LABELS, Placement(1.0, 2.0), (40, 48), (5, 6))
        for row, column in np.ndindex(5, 6):
            counts = Counter(values[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(-1).tolist())
            assert counts[int(found[row, column])] == max(counts.values())

    def test_a_thumbnail_pixel_may_hold_many_map_pixels(self):
        # four ninths of each 300 x 300 are stroma, and 9 of its 16 places
        values = np.zeros((600, 900), np.uint8)
        rows, columns = np.ogrid[:600, :900]
        values[(rows % 300 < 200) & (columns % 300 < 200)] = 1
        found = classes_of_thumbnail(values, LABELS, Placement(1.0, 1.0), (600, 900), (2, 3))
        assert (found == 1).all()

    def test_each_window_of_the_map_is_read_once(self, monkeypatch):
        monkeypatch.setattr(overlay, "windows", partial(windows, side=100))
        values = blobs(512)
        watched = Watched(values, 100**2)
        found = classes_of_thumbnail(watched, LABELS, Placement(1.0, 1.0), (512, 512), (64, 64))
        assert (found == classes_of_thumbnail(values, LABELS, Placement(1.0, 1.0), (512, 512), (64, 64))).all()
        assert len(watched.windows) == 36


class TestPicture:
    def picture(self, path: Path, values: np.ndarray, thumbnail: np.ndarray, **options) -> np.ndarray:
        write_overlay(path, thumbnail, values, LABELS, Placement(1.0, 10.0), (400, 600), **options)
        with Image.open(path) as opened:
            assert opened.format == "JPEG"
            return np.asarray(opened)

    def test_tissue_is_coloured_and_the_rest_is_the_thumbnail(self, tmp_path):
        values = np.full((40, 60), 255, np.uint8)
        values[:20, :20], values[20:, :20], values[:20, 20:40] = 0, 1, 3
        thumbnail = np.full((200, 300, 3), (220, 150, 190), np.uint8)
        seen = self.picture(tmp_path / "overlay.jpg", values, thumbnail)
        assert seen.shape[1] == 300
        assert seen.shape[0] > 200
        grey = 0.299 * 220 + 0.587 * 150 + 0.114 * 190
        for label, (row, column) in {0: (50, 50), 1: (150, 50)}.items():
            assert seen[row, column] == pytest.approx(0.5 * (grey + np.array(LABELS.colours[label])), abs=4)
        for row, column in ((50, 150), (50, 250), (150, 150)):
            assert seen[row, column] == pytest.approx(thumbnail[row, column], abs=4)

    def test_the_legend_has_a_swatch_of_each_tissue_class(self, tmp_path):
        values = np.full((40, 60), 255, np.uint8)
        values[:, :30], values[:10, 30:], values[10:20, 30:] = 0, 2, 3
        thumbnail = np.full((200, 300, 3), 255, np.uint8)
        strip = self.picture(tmp_path / "overlay.jpg", values, thumbnail)[200:].astype(int)
        for colour in LABELS.colours[:3]:
            shown = 0.5 * (np.array(colour) + overlay.TISSUE_GREY)
            assert (np.abs(strip - shown).max(2) < 12).sum() > 50
        given_rows = [AreaRow(name, 1, 1.0, 12.5) for name in LABELS.names]
        other = self.picture(tmp_path / "other.jpg", values, thumbnail, areas=given_rows)[200:]
        assert (np.abs(strip - other).max(2) > 100).any()

    def test_white_is_not_in_the_legend(self):
        rows = [AreaRow(name, 1, 1.0, 12.5) for name in LABELS.names]
        others = [*rows[:3], AreaRow("something else", 9, 1.0, None)]
        assert (legend(LABELS, rows, 300) == legend(LABELS, others, 300)).all()

    @pytest.mark.parametrize("width", [40, 224, 2048])
    def test_a_legend_is_as_wide_as_the_picture_and_has_room(self, width):
        labels = LabelSpace(tuple(f"class with a long name {index}" for index in range(12)))
        rows = [AreaRow(name, 1, 1.0, 100 / 12) for name in labels.names]
        strip = legend(labels, rows, width)
        assert strip.shape[1:] == (width, 3)
        # nothing stands in the last columns where entries go to further lines
        assert width == 40 or (strip[:, -3:] == 255).all()

    def test_without_tissue_names_stand_alone(self):
        rows = [AreaRow(name, 0, 0.0, None) for name in LABELS.names]
        assert legend(LABELS, rows, 300).shape[1] == 300
