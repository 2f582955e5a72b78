from __future__ import annotations

import numpy as np
import pytest
import shapely
import zarr
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from rasterio import features
from scipy import ndimage

from tests.slides.export.maps import LABELS, Watched, blobs, maps
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.slides.export.polygons import THREADS, TissuePolygon, tissue_polygons

CHECKERBOARD = np.indices((9, 8)).sum(0).astype(np.uint8) % 2
ONION = np.minimum.reduce([*np.indices((11, 11)), *(10 - np.indices((11, 11)))]).astype(np.uint8) % 3
DIAGONAL = np.where(np.eye(8, dtype=bool), 1, 255).astype(np.uint8)
STAIRS = np.tril(np.ones((10, 10), np.uint8)) + np.tril(np.ones((10, 10), np.uint8), -1)
COMB = np.full((9, 15), 255, np.uint8)
COMB[1:, ::2], COMB[0] = 1, 1
LOOPS = np.array([[0, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], np.uint8)
PATTERNS = (CHECKERBOARD, ONION, DIAGONAL, STAIRS, COMB, LOOPS, np.zeros((1, 1), np.uint8))

full_maps = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 2))


def cut(classes, *, block: int = 2048, tolerance: float = 0, min_area: float = 0) -> list[TissuePolygon]:
    return list(tissue_polygons(classes, LABELS, block=block, tolerance=tolerance, min_area=min_area))


def geometries(polygons: list[TissuePolygon]) -> np.ndarray:
    return np.array([polygon.geometry for polygon in polygons], object)


def painted(polygons: list[TissuePolygon], shape: tuple[int, int]) -> np.ndarray:
    if not polygons:
        return np.full(shape, 255, np.uint8)
    return features.rasterize(
        [(polygon.geometry, polygon.label) for polygon in polygons], shape, fill=255, dtype=np.uint8
    )


def outlines(polygons: list[TissuePolygon]) -> set[tuple[int, bytes]]:
    """Class and outline of each, told by every corner of pixels that it passes."""
    stepped = shapely.transform(shapely.segmentize(geometries(polygons), 1), np.round)
    return {
        (polygon.label, shapely.to_wkb(outline))
        for polygon, outline in zip(polygons, shapely.normalize(stepped), strict=True)
    }


def tissue_of(values: np.ndarray) -> np.ndarray:
    return np.where(values < 3, values, 255)


def check_exact(values: np.ndarray, block: int) -> None:
    polygons = cut(values, block=block)
    assert (painted(polygons, values.shape) == tissue_of(values)).all()
    assert all(type(polygon.geometry) is shapely.Polygon for polygon in polygons)
    assert shapely.is_valid(geometries(polygons)).all()
    for label in range(3):
        own = [polygon.geometry.area for polygon in polygons if polygon.label == label]
        assert len(own) == ndimage.label(values == label)[1]
        assert sum(own) == (values == label).sum()


class TestExact:
    @given(maps, st.integers(1, 21))
    @settings(max_examples=300)
    def test_painting_gives_the_map_back_and_regions_are_4_connected(self, values, block):
        check_exact(values, block)

    @pytest.mark.parametrize("values", PATTERNS)
    @pytest.mark.parametrize("block", [1, 2, 3, 4, 5, 7, 2048])
    def test_patterns(self, values, block):
        check_exact(values, block)

    @given(maps, st.integers(1, 21), st.integers(1, 21))
    def test_blocks_do_not_show(self, values, block, other):
        assert outlines(cut(values, block=block)) == outlines(cut(values, block=other))

    def test_a_large_map_from_zarr(self, tmp_path):
        values = blobs(700)
        values[100:130, 50:300] = 255
        stored = zarr.create_array(tmp_path / "map.zarr", shape=values.shape, chunks=(128, 128), dtype="uint8")
        stored[:] = values
        polygons = cut(stored, block=256)
        assert outlines(polygons) == outlines(cut(values))
        assert (painted(polygons, values.shape) == tissue_of(values)).all()


class TestSimplified:
    @given(maps, st.integers(1, 21), st.sampled_from([0.5, 1, 2, 10]))
    @settings(max_examples=300)
    @example(ONION, 4, 10)
    @example(LOOPS, 3, 10)
    def test_polygons_stay_valid_and_apart(self, values, block, tolerance):
        exact, simple = cut(values, block=block), cut(values, block=block, tolerance=tolerance)
        assert [polygon.label for polygon in simple] == [polygon.label for polygon in exact]
        found = geometries(simple)
        assert all(type(polygon) is shapely.Polygon for polygon in found)
        assert shapely.is_valid(found).all()
        assert shapely.area(shapely.union_all(found)) == pytest.approx(shapely.area(found).sum())

    @given(full_maps, st.integers(1, 21), st.sampled_from([1, 3, 10]))
    def test_there_are_no_gaps_where_all_is_mapped(self, values, block, tolerance):
        found = geometries(cut(values, block=block, tolerance=tolerance))
        assert shapely.union_all(found).equals(shapely.box(0, 0, values.shape[1], values.shape[0]))
        assert shapely.area(found).sum() == values.size

    @given(full_maps, st.sampled_from([0, 1, 3]))
    @example(np.array([[0, 0, 0], [1, 2, 1]], np.uint8), 0)
    @example(np.array([[0, 0], [1, 2]], np.uint8), 0)
    def test_neighbours_have_the_same_vertices_along_their_common_outline(self, values, tolerance):
        assert shapely.coverage_is_valid(geometries(cut(values, tolerance=tolerance)))

    @pytest.mark.parametrize("block", [64, 100, 2048])
    def test_areas_change_little_and_vertices_go(self, block):
        values = blobs(400)
        exact, simple = cut(values, block=block), cut(values, block=block, tolerance=1)
        before, after = (shapely.get_num_coordinates(geometries(each)).sum() for each in (exact, simple))
        assert after < 0.6 * before
        for label in range(3):
            area = sum(polygon.geometry.area for polygon in simple if polygon.label == label)
            assert area == pytest.approx((values == label).sum(), rel=0.005)

    def test_the_outline_towards_unmapped_pixels_is_simplified_too(self):
        values = np.where(np.tril(np.ones((64, 64), bool)), 1, 255).astype(np.uint8)
        (exact,), (simple,) = cut(values), cut(values, tolerance=1)
        assert len(exact.geometry.exterior.coords) > 120
        assert len(simple.geometry.exterior.coords) < 80
        (simpler,) = cut(values, tolerance=3)
        assert len(simpler.geometry.exterior.coords) < 20

    def test_where_simplifying_fails_polygons_stay_exact(self, monkeypatch):
        bow_tie = shapely.Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
        monkeypatch.setattr(shapely, "coverage_simplify", lambda given, *_, **__: np.full(len(given), bow_tie))
        values = blobs(60)
        assert outlines(cut(values, tolerance=1)) == outlines(cut(values))

    def test_vertices_are_corners_of_pixels(self):
        found = shapely.get_coordinates(geometries(cut(blobs(200), block=64, tolerance=2)))
        assert (found == np.round(found)).all()


class TestSmall:
    def values(self) -> np.ndarray:
        values = np.full((40, 40), 1, np.uint8)
        values[20:] = 2
        values[5, 5] = 0  # a speck in stroma
        values[10:12, 10:12] = 3  # a small white hole
        values[5:9, 20:30] = 0  # 40 px of gland
        values[12:17, 20:30] = 255  # 50 px that were not mapped
        values[19:21, 30:33] = 0  # a speck between two
        return values

    @pytest.mark.parametrize("block", [4, 7, 20, 2048])
    def test_specks_become_part_of_what_is_around_them(self, block):
        polygons = cut(self.values(), block=block, min_area=16)
        areas = {polygon.label: polygon.geometry.area for polygon in polygons}
        assert areas == {0: 40, 1: 800 - 40 - 50 - 3, 2: 800 - 3}
        stroma = next(polygon.geometry for polygon in polygons if polygon.label == 1)
        assert [shapely.Polygon(hole).area for hole in stroma.interiors] in ([40, 50], [50, 40])

    @given(maps, st.integers(1, 21), st.sampled_from([0, 1, 5]), st.sampled_from([1, 2, 9]))
    def test_polygons_stay_apart_without_small_ones(self, values, block, tolerance, min_area):
        found = geometries(cut(values, block=block, tolerance=tolerance, min_area=min_area))
        holes = [shapely.Polygon(hole).area for polygon in found for hole in polygon.interiors]
        assert (shapely.area(found) >= min_area).all()
        assert all(area >= min_area for area in holes)
        assert shapely.is_valid(found).all()
        assert shapely.area(shapely.union_all(found)) == pytest.approx(shapely.area(found).sum())

    @given(maps, st.integers(1, 21), st.sampled_from([1, 2, 9]))
    def test_what_is_large_is_kept(self, values, block, min_area):
        polygons = cut(values, block=block, min_area=min_area)
        for label in range(3):
            regions, count = ndimage.label(values == label)
            filled = [ndimage.binary_fill_holes(regions == number).sum() for number in range(1, count + 1)]
            sizes = np.bincount(regions.reshape(-1))[1:]
            own = sum(polygon.label == label for polygon in polygons)
            assert (sizes >= min_area).sum() <= own <= (np.array(filled) >= min_area).sum()


class TestStreaming:
    def test_blocks_are_read_once_and_regions_given_when_done(self):
        values = np.full((60, 60), 255, np.uint8)
        values[2:5, 2:5] = 0
        values[8:12, 2:5] = 1
        values[30:33, 30:33] = 2
        watched = Watched(values, 100)
        polygons = tissue_polygons(watched, LABELS, block=10, min_area=0)
        found = [(polygon.label, len(watched.windows)) for polygon in polygons]
        # the first lies in block 1 of 36; the second ends in block 7, below it; some blocks are read ahead
        assert [label for label, _ in found] == [0, 1, 2]
        for (_, read), block in zip(found, (1, 7, 22), strict=True):
            assert block <= read <= block + THREADS
        assert len(watched.windows) == 36

    def test_the_same_map_gives_the_same_order(self):
        values = blobs(200)
        first, second = cut(values, block=64, tolerance=1), cut(values.copy(), block=64, tolerance=1)
        assert [polygon.label for polygon in first] == [polygon.label for polygon in second]
        assert (shapely.to_wkb(geometries(first)) == shapely.to_wkb(geometries(second))).all()


def test_white_and_unmapped_pixels_have_no_polygons():
    assert cut(np.array([[3, 255], [255, 3]], np.uint8)) == []
    without_white = LabelSpace(("a", "b", "c", "d"))
    (polygon,) = tissue_polygons(np.array([[3, 255]], np.uint8), without_white, min_area=0)
    assert (polygon.label, polygon.geometry.area) == (3, 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [("tolerance", -1), ("min_area", -0.5), ("block", 0), ("tolerance", float("nan")), ("min_area", float("inf"))],
)
def test_bad_options_are_refused_at_once(option, value):
    with pytest.raises(InputError, match=f"{option} {value}: is not a number from"):
        tissue_polygons(np.zeros((2, 2), np.uint8), LABELS, **{option: value})
