from __future__ import annotations

import gzip
import json
import tracemalloc
import uuid
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from rasterio import features

from tests.slides.export.maps import LABELS, blobs
from tissuehint.data.qupath import read_annotations
from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.export.geojson import write_geojson
from tissuehint.slides.export.polygons import TissuePolygon, tissue_polygons

PLACEMENT = Placement(um_per_px=1.0, scale=2.0040161, top=101.25, left=17.3)
SQUARE = TissuePolygon(shapely.Polygon([(0, 0), (0, 4), (4, 4), (4, 0)], [[(1, 1), (3, 1), (3, 3), (1, 3)]]), 1)


def features_of(path: Path) -> list[dict]:
    data = path.read_bytes()
    content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    assert content["type"] == "FeatureCollection"
    return content["features"]


def objects_of(path: Path, corner: tuple[float, float] = (0.0, 0.0)):
    """Geometries on level 0 of the slide and class names, as ``data tile`` reads them."""
    for annotation in read_annotations(path):
        geometry = shapely.from_geojson(json.dumps(annotation.geometry))
        yield shapely.transform(geometry, lambda points: points + corner[::-1]), annotation.label


class TestWrite:
    def test_a_feature_is_what_qupath_reads(self, tmp_path):
        path = tmp_path / "tissue.geojson.gz"
        assert write_geojson(path, [SQUARE], LABELS, Placement(0.5, 2.0, 10.0, 100.0)) == 1
        (feature,) = features_of(path)
        assert feature["type"] == "Feature"
        assert uuid.UUID(feature["id"]).version == 5
        assert feature["properties"] == {
            "objectType": "annotation",
            "classification": {"name": "stroma", "color": list(LABELS.colours[1])},
            "measurements": {"area mm2": 12 * 0.25e-6},
            "isLocked": False,
        }
        shell, hole = feature["geometry"]["coordinates"]
        assert feature["geometry"]["type"] == "Polygon"
        assert {tuple(point) for point in shell} == {(100, 10), (108, 10), (108, 18), (100, 18)}
        assert {tuple(point) for point in hole} == {(102, 12), (106, 12), (106, 16), (102, 16)}

    def test_rings_are_closed_and_turn_as_rfc_7946_has_it(self, tmp_path):
        path = tmp_path / "tissue.geojson.gz"
        write_geojson(path, tissue_polygons(blobs(100), LABELS), LABELS, PLACEMENT)
        found = features_of(path)
        assert len(found) > 10
        for feature in found:
            shell, *holes = feature["geometry"]["coordinates"]
            assert shell[0] == shell[-1]
            assert shapely.LinearRing(shell).is_ccw
            assert not any(shapely.LinearRing(hole).is_ccw for hole in holes)

    def test_coordinates_are_measured_from_the_corner_with_two_decimals(self, tmp_path):
        path = tmp_path / "tissue.geojson"
        write_geojson(path, [SQUARE], LABELS, PLACEMENT, corner=(100.0, 7.0))
        points = np.array(features_of(path)[0]["geometry"]["coordinates"][0])
        assert points.min(0).tolist() == [10.3, 1.25]
        assert points.max(0).tolist() == [round(10.3 + 4 * PLACEMENT.scale, 2), round(1.25 + 4 * PLACEMENT.scale, 2)]

    def test_detections_by_option(self, tmp_path):
        write_geojson(tmp_path / "a.geojson", [SQUARE], LABELS, PLACEMENT, kind="detection")
        assert features_of(tmp_path / "a.geojson")[0]["properties"]["objectType"] == "detection"

    def test_decimals_never_make_a_polygon_invalid(self, tmp_path):
        thin = TissuePolygon(
            shapely.Polygon([(0, 0), (100, 1), (200, 0), (200, 3), (0, 3)], [[(99, 2), (101, 2), (100, 1.2)]]), 0
        )
        assert thin.geometry.is_valid
        write_geojson(tmp_path / "a.geojson", [thin, SQUARE], LABELS, Placement(1.0, 0.004))
        ((first, _), (second, _)) = objects_of(tmp_path / "a.geojson")
        assert first.is_valid
        assert second.is_valid
        assert first.area == pytest.approx(thin.geometry.area * 0.004**2, rel=0.01)

    def test_the_same_content_gives_the_same_bytes_and_ids_differ(self, tmp_path):
        polygons = list(tissue_polygons(blobs(100), LABELS))
        for name in ("a.geojson.gz", "other/b.geojson.gz"):
            write_geojson(tmp_path / name, polygons, LABELS, PLACEMENT)
        first, second = (tmp_path / name for name in ("a.geojson.gz", "other/b.geojson.gz"))
        assert first.read_bytes() == second.read_bytes()
        assert first.read_bytes()[4:8] == bytes(4)  # time in the header
        found = features_of(first)
        assert len({feature["id"] for feature in found}) == len(found)
        write_geojson(tmp_path / "c.geojson", [SQUARE, SQUARE], LABELS, PLACEMENT)
        one, two = features_of(tmp_path / "c.geojson")
        assert one["id"] != two["id"]

    def test_no_polygons_are_a_file_too(self, tmp_path):
        assert write_geojson(tmp_path / "a.geojson.gz", [], LABELS, PLACEMENT) == 0
        assert features_of(tmp_path / "a.geojson.gz") == []
        assert list(objects_of(tmp_path / "a.geojson.gz")) == []

    def test_other_letters_are_written_in_ascii(self, tmp_path):
        labels = LabelSpace(('Drüse "A"', "間質"))
        write_geojson(tmp_path / "a.geojson", [SQUARE], labels, PLACEMENT)
        assert (tmp_path / "a.geojson").read_bytes().isascii()
        ((_, name),) = objects_of(tmp_path / "a.geojson")
        assert name == "間質"

    def test_polygons_are_taken_one_by_one(self, tmp_path):
        ring = shapely.Point(0, 0).buffer(100, quad_segs=600)

        def many(count: int):
            for index in range(count):
                yield TissuePolygon(shapely.transform(ring, lambda points, shift=index: points + 300 * shift), 0)

        peaks = []
        for count in (2, 20):
            tracemalloc.start()
            write_geojson(tmp_path / "a.geojson.gz", many(count), LABELS, PLACEMENT)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.2 * peaks[0]

    def test_a_failure_leaves_no_file(self, tmp_path):
        def failing():
            yield SQUARE
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            write_geojson(tmp_path / "a.geojson.gz", failing(), LABELS, PLACEMENT)
        assert list(tmp_path.iterdir()) == []


class TestReadBack:
    @given(
        st.integers(0, 5),
        st.floats(0.3, 8),
        st.tuples(st.floats(-50, 5000), st.floats(-50, 5000)),
        st.tuples(st.floats(0, 900), st.floats(0, 900)),
    )
    def test_the_file_paints_the_class_map(self, tmp_path_factory, seed, scale, start, corner):
        values = blobs(40, seed)
        values[:5] = 255
        placement, path = Placement(1.0, scale, *start), tmp_path_factory.mktemp("geojson") / "tissue.geojson.gz"
        write_geojson(path, tissue_polygons(values, LABELS, tolerance=0, min_area=0), LABELS, placement, corner=corner)
        shapes = []
        for geometry, name in objects_of(path, corner=corner):
            assert geometry.is_valid

            def on_map(points: np.ndarray) -> np.ndarray:
                rows, columns = placement.to_map(points[:, 1], points[:, 0])
                return np.stack([columns, rows], 1)

            shapes.append((shapely.transform(geometry, on_map), LABELS.index(name)))
        painted = features.rasterize(shapes, values.shape, fill=255, dtype=np.uint8)
        assert (painted == np.where(values < 3, values, 255)).all()
