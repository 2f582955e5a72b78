from __future__ import annotations

import gzip
import json

import pytest

from tissuehint.data.qupath import read_annotations
from tissuehint.errors import InputError

POINT = {"type": "Point", "coordinates": [3.5, 4.5]}
SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [2, 0], [2, 2], [0, 2], [0, 0]]]}
FEATURES = [
    {"type": "Feature", "geometry": SQUARE, "properties": {"classification": {"name": "Tumour", "colorRGB": 1}}},
    {"type": "Feature", "geometry": POINT, "properties": {"classification": {"names": ["Tumour", "positive"]}}},
    {"type": "Feature", "geometry": SQUARE, "properties": {"objectType": "annotation"}},
    {"type": "Feature", "geometry": SQUARE},
]


@pytest.mark.parametrize("content", [FEATURES, {"type": "FeatureCollection", "features": FEATURES}])
@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz"])
def test_what_qupath_exports(tmp_path, content, name):
    data = json.dumps(content).encode("utf-8-sig")
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = read_annotations(path)
    assert [one.label for one in found] == ["Tumour", "Tumour: positive", None, None]
    assert [one.geometry for one in found] == [SQUARE, POINT, SQUARE, SQUARE]
    assert [one.place for one in found] == [f"feature {number}" for number in (1, 2, 3, 4)]


def test_a_single_feature(tmp_path):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(FEATURES[0]))
    (found,) = read_annotations(path)
    assert found.label == "Tumour"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 100_000, "cannot be parsed"),
        (b"3", "is no FeatureCollection, list of features or feature"),
        (b'{"type": "FeatureCollection"}', "is no FeatureCollection"),
        (gzip.compress(b'{"type": "FeatureCollection", "features": []}' * 9, mtime=0)[:-12], "cannot be read"),
        (b"\x1f\x8b\x08\x00broken", "cannot be read"),
        (gzip.compress(b"[]" * 99, mtime=0)[:12] + b"broken" * 9, "cannot be read"),
        (b'[{"type": "Feature", "geometry": null}]', "feature 1 has no geometry"),
        (b'[{"geometry": {"type": 3}}]', "feature 1 has no geometry"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.geojson"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_annotations(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.geojson.* does not exist"):
        read_annotations(tmp_path / "none.geojson")
