from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tests.slides.export.maps import LABELS, VALUES, Watched, blobs
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.export import ome_tiff
from tissuehint.slides.export.ome_tiff import write_ome_tiff

PLACEMENT = Placement(um_per_px=0.9987, scale=2.0040161, top=101.25, left=17.3)
OME = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"

odd_maps = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=90), elements=st.sampled_from(VALUES))


def levels_of(path: Path) -> list[np.ndarray]:
    with tifffile.TiffFile(path) as file:
        (series,) = file.series
        return [level.asarray() for level in series.levels]


def halved_slowly(values: np.ndarray, ignore: int = 255) -> np.ndarray:
    height, width = values.shape
    found = np.zeros((-(-height // 2), -(-width // 2)), np.uint8)
    for row, column in np.ndindex(found.shape):
        rows, columns = (
            [min(2 * row + step, height - 1) for step in (0, 1)],
            [min(2 * column + step, width - 1) for step in (0, 1)],
        )
        four = [int(values[r, c]) for r in rows for c in columns]
        counts = Counter(four)
        # max takes the first of equals, that is the upper left one
        found[row, column] = max(four, key=lambda value: (counts[value], value != ignore))
    return found


def written(tmp_path: Path, values, **options) -> Path:
    path = tmp_path / "classes.ome.tif"
    write_ome_tiff(path, values, LABELS, PLACEMENT, **options)
    return path


class TestLevels:
    @given(odd_maps, st.sampled_from([16, 32]))
    @settings(max_examples=60)
    def test_each_is_the_majority_of_the_one_above(self, tmp_path_factory, values, tile):
        levels = levels_of(written(tmp_path_factory.mktemp("ome"), values, tile=tile))
        assert (levels[0] == values).all()
        for above, below in itertools.pairwise(levels):
            assert (below == halved_slowly(above)).all()
        assert max(levels[-1].shape) <= tile
        assert len(levels) == 1 or max(levels[-2].shape) > tile

    @pytest.mark.parametrize("column", range(100, 104))
    def test_a_thin_line_of_tissue_survives_in_what_was_not_mapped(self, tmp_path, column):
        values = np.full((256, 256), 255, np.uint8)
        values[:, column] = 1
        levels = levels_of(written(tmp_path, values, tile=16))
        assert len(levels) == 5
        assert all((level == 1).any(1).all() for level in levels)

    def test_no_class_gains_on_another(self, tmp_path):
        values = blobs(512)
        levels = levels_of(written(tmp_path, values, tile=64))
        for value in range(4):
            assert (levels[2] == value).mean() == pytest.approx((values == value).mean(), abs=0.005)

    def test_another_ignore_value(self, tmp_path):
        labels = LabelSpace(("gland", "stroma"), ignore=7)
        values = np.tile(np.array([[7, 1]], np.uint8), (40, 20))
        write_ome_tiff(tmp_path / "a.ome.tif", values, labels, PLACEMENT, tile=16)
        assert (levels_of(tmp_path / "a.ome.tif")[1] == 1).all()


class TestReaders:
    @pytest.fixture(scope="class")
    @staticmethod
    def path(tmp_path_factory):
        return written(tmp_path_factory.mktemp("ome"), blobs(700)[:, :601], tile=128)

    def test_tifffile(self, path):
        with tifffile.TiffFile(path) as file:
            assert file.is_ome
            assert not file.is_bigtiff
            (series,) = file.series
            assert [level.shape for level in series.levels] == [(700, 601), (350, 301), (175, 151), (88, 76)]
            assert len(file.pages) == 1
            for number, level in enumerate(series.levels):
                page = level.pages[0]
                assert page.is_tiled
                assert page.photometric == tifffile.PHOTOMETRIC.PALETTE
                assert (page.colormap.T[:256] // 257 == LABELS.colour_table()).all()
                assert page.get_resolution("micrometer") == pytest.approx((1 / 0.9987 / 2**number,) * 2)

    def test_ome_xml(self, path):
        with tifffile.TiffFile(path) as file:
            root = ET.fromstring(file.ome_metadata)
        pixels = root.find(f"{OME}Image/{OME}Pixels")
        assert float(pixels.get("PhysicalSizeX")) == float(pixels.get("PhysicalSizeY")) == 0.9987
        assert pixels.get("PhysicalSizeXUnit") == pixels.get("PhysicalSizeYUnit") == "µm"
        assert (pixels.get("SizeX"), pixels.get("SizeY"), pixels.get("Type")) == ("601", "700", "uint8")
        annotation = root.find(f"{OME}StructuredAnnotations/{OME}MapAnnotation")
        assert annotation.get("Namespace") == "tissuehint/classes"
        values = {item.get("K"): json.loads(item.text) for item in annotation.iter(f"{OME}M")}
        assert LabelSpace.from_dict(values["labels"]) == LABELS
        assert Placement(**values["placement"]) == PLACEMENT
        reference = root.find(f"{OME}Image/{OME}AnnotationRef")
        assert reference.get("ID") == annotation.get("ID")

    def test_openslide_gives_class_colours_at_the_right_size(self, path):
        with openslide.OpenSlide(path) as slide:
            assert slide.dimensions == (601, 700)
            for axis in "xy":
                assert float(slide.properties[f"openslide.mpp-{axis}"]) == pytest.approx(0.9987, rel=1e-6)
            seen = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))
        assert (seen[..., 3] == 255).all()
        assert (seen[..., :3] == LABELS.colour_table()[blobs(700)[:, :601]]).all()

    def test_tiffslide_gives_all_levels_at_the_right_size(self, path):
        with tiffslide.TiffSlide(path) as slide:
            assert slide.level_dimensions == ((601, 700), (301, 350), (151, 175), (76, 88))
            assert slide.properties["tiffslide.mpp-x"] == pytest.approx(0.9987, rel=1e-6)
            assert slide.properties["tiffslide.mpp-y"] == pytest.approx(0.9987, rel=1e-6)
            seen = np.asarray(slide.read_region((0, 0), 1, (301, 350), as_array=True)).squeeze()
        assert (seen == levels_of(path)[1]).all()


class TestStreaming:
    def test_the_map_is_read_in_strips_of_tiles(self, tmp_path):
        values = blobs(600)
        watched = Watched(values, 16 * 16 * ome_tiff.ACROSS)
        assert (levels_of(written(tmp_path, watched, tile=16))[0] == values).all()

    def test_from_zarr(self, tmp_path):
        values = blobs(300)
        stored = zarr.create_array(tmp_path / "map.zarr", shape=values.shape, chunks=(100, 70), dtype="uint8")
        stored[:] = values
        assert (levels_of(written(tmp_path, stored, tile=64))[0] == values).all()

    def test_the_same_map_gives_the_same_bytes_and_leaves_nothing_else(self, tmp_path):
        paths = [written(tmp_path / name, blobs(200), tile=32) for name in ("a", "b")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert [path.name for path in paths[0].parent.iterdir()] == ["classes.ome.tif"]

    def test_a_failure_leaves_nothing(self, tmp_path):
        with pytest.raises(AssertionError, match="at a time"):
            written(tmp_path, Watched(blobs(100), 10), tile=16)
        assert list(tmp_path.iterdir()) == []

    def test_large_ones_are_bigtiff(self, tmp_path, monkeypatch):
        monkeypatch.setattr(ome_tiff, "LARGEST_CLASSIC", 1000)
        path = written(tmp_path, blobs(200), tile=32)
        with tifffile.TiffFile(path) as file:
            assert file.is_bigtiff
        assert (levels_of(path)[0] == blobs(200)).all()
        with openslide.OpenSlide(path) as slide:
            assert slide.dimensions == (200, 200)

    @pytest.mark.parametrize("compression", [None, "lzw", "zstd"])
    def test_other_compressions(self, tmp_path, compression):
        assert (levels_of(written(tmp_path, blobs(100), tile=32, compression=compression))[0] == blobs(100)).all()


@pytest.mark.parametrize("tile", [0, 8, 100])
def test_a_bad_tile_is_refused(tmp_path, tile):
    with pytest.raises(InputError, match=f"tile {tile}: is not a multiple of 16"):
        written(tmp_path, blobs(20), tile=tile)


def test_an_empty_map_is_refused(tmp_path):
    with pytest.raises(InputError, match="class map of 0 x 5 px: has no pixels"):
        written(tmp_path, np.zeros((0, 5), np.uint8))
