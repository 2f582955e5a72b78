from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tests.slides.export.maps import LABELS, Watched, maps
from tissuehint.labels import LabelSpace
from tissuehint.slides.export.areas import area_rows, write_areas
from tissuehint.slides.export.class_map import windows


@given(
    maps,
    st.integers(1, 25),
    st.none() | st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_windows_cover_each_pixel_once_within_their_size(values, side, chunks):
    seen = np.zeros(values.shape, int)
    for rows, columns in windows(Watched(values, side * side, chunks), side):
        assert rows.stop - rows.start <= side
        assert columns.stop - columns.start <= side
        seen[rows, columns] += 1
    assert (seen == 1).all()


def test_windows_are_made_of_whole_chunks():
    classes = Watched(np.zeros((100, 90), np.uint8), 10_000, (16, 12))
    starts = [(rows.start, columns.start) for rows, columns in windows(classes, 50)]
    assert starts == [(top, left) for top in (0, 48, 96) for left in (0, 48)]


@given(maps, st.floats(0.1, 10))
def test_counts_and_shares_are_those_of_the_whole_map(values, um_per_px):
    rows = area_rows(values, LABELS, um_per_px)
    assert [row.name for row in rows] == list(LABELS.names)
    assert [row.pixels for row in rows] == [(values == index).sum() for index in range(4)]
    assert [row.mm2 for row in rows] == pytest.approx([row.pixels * um_per_px**2 * 1e-6 for row in rows])
    assert rows[3].percent is None
    tissue = (values < 3).sum()
    if tissue:
        assert sum(row.percent for row in rows[:3]) == pytest.approx(100)
        assert [row.percent for row in rows[:3]] == pytest.approx([100 * row.pixels / tissue for row in rows[:3]])
    else:
        assert all(row.percent is None for row in rows)


def test_a_large_map_is_read_in_windows(tmp_path):
    values = np.random.default_rng(0).integers(0, 4, (5000, 3000)).astype(np.uint8)
    stored = zarr.create_array(tmp_path / "map.zarr", shape=values.shape, chunks=(1024, 1024), dtype="uint8")
    stored[:] = values
    expected = np.bincount(values.reshape(-1)).tolist()
    for classes in (stored, Watched(values, 2048 * 2048)):
        assert [row.pixels for row in area_rows(classes, LABELS, 1.0)] == expected


def test_without_a_white_class_every_class_has_a_share():
    rows = area_rows(np.array([[0, 1, 1, 255]], np.uint8), LabelSpace(("gland", "stroma")), 1000.0)
    assert [tuple(row) for row in rows] == [("gland", 1, 1.0, 100 / 3), ("stroma", 2, 2.0, 200 / 3)]


def test_the_table_has_one_form(tmp_path: Path):
    path = tmp_path / "slide" / "areas.csv"
    write_areas(path, area_rows(np.array([[0, 0, 1, 3, 255, 255]], np.uint8), LABELS, 0.5))
    lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    assert lines == [
        ["class", "pixels", "mm2", "percent_of_tissue"],
        ["gland", "2", "5e-07", "66.6667"],
        ["stroma", "1", "2.5e-07", "33.3333"],
        ["necrosis", "0", "0", "0.0000"],
        ["white", "1", "2.5e-07", ""],
    ]
