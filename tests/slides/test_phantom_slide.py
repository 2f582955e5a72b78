import tracemalloc

import numpy as np
import openslide
import pytest
import tifffile
import tiffslide
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.data import phantom_slide, phantom_slide_tissue
from tissuehint.data.phantom_slide import write_phantom_slide
from tissuehint.data.phantom_slide_tissue import SlideTissue
from tissuehint.data.phantom_tissue import PHANTOM_LABELS
from tissuehint.errors import InputError

WHITE = PHANTOM_LABELS.white
HEIGHT, WIDTH = 523, 642


@pytest.fixture(scope="module", autouse=True)
def small_textures():
    """Rendering five squares of 1024 pixels takes seconds; 96 will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom_slide_tissue, "TEXTURE", 96)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    write_phantom_slide(
        folder / "odd.svs",
        HEIGHT,
        WIDTH,
        seed=3,
        um_per_px=0.499,
        levels=(1, 3, 7.5),
        mask_path=folder / "odd_mask.tif",
    )
    write_phantom_slide(folder / "bounds.scn", HEIGHT, WIDTH, seed=3, levels=(1, 2), margins=(70, 40, 30, 110))
    return folder


@pytest.fixture(scope="module")
def plane():
    return SlideTissue.random(HEIGHT, WIDTH, seed=3, um_per_px=0.499)


def difference(first, second):
    return np.abs(np.asarray(first, float)[..., :3] - np.asarray(second, float)[..., :3]).mean()


@pytest.mark.parametrize(("reader", "name"), [(openslide.OpenSlide, "openslide"), (tiffslide.TiffSlide, "tiffslide")])
def test_readers_see_levels_and_pixel_size(folder, plane, reader, name):
    with reader(folder / "odd.svs") as slide:
        assert slide.level_dimensions == ((642, 523), (214, 174), (85, 69))
        np.testing.assert_allclose(slide.level_downsamples, (1, 3, 7.5), rtol=0.02)
        assert float(slide.properties[f"{name}.mpp-x"]) == pytest.approx(0.499, abs=1e-6)
        assert float(slide.properties[f"{name}.mpp-y"]) == pytest.approx(0.499, abs=1e-6)
        image = slide.read_region((0, 0), 0, (WIDTH, HEIGHT))
    assert difference(image, plane.window(0, 0, HEIGHT, WIDTH)) < 6


def test_mask_is_exact(folder, plane):
    mask = tifffile.imread(folder / "odd_mask.tif")
    np.testing.assert_array_equal(mask, plane.classes(0, 0, HEIGHT, WIDTH))
    assert np.unique(mask).size >= 4


def test_each_class_shows_its_own_texture(plane):
    image, mask = plane.render(0, 0, HEIGHT, WIDTH)
    side = plane.textures.shape[1]
    unfolded = np.concatenate([np.arange(side), np.arange(side)[::-1]])
    rows, columns = np.resize(unfolded, HEIGHT), np.resize(unfolded, WIDTH)
    expected = plane.textures[mask, rows[:, None], columns[None, :]]
    np.testing.assert_array_equal(image, expected)


@given(st.data())
@settings(max_examples=20)
def test_a_window_is_the_crop_of_the_whole(plane, data):
    top, left = data.draw(st.integers(0, HEIGHT - 1)), data.draw(st.integers(0, WIDTH - 1))
    height, width = data.draw(st.integers(1, HEIGHT - top)), data.draw(st.integers(1, WIDTH - left))
    image, mask = plane.render(top, left, height, width)
    whole, whole_mask = plane.render(0, 0, HEIGHT, WIDTH)
    np.testing.assert_array_equal(mask, whole_mask[top : top + height, left : left + width])
    np.testing.assert_array_equal(image, whole[top : top + height, left : left + width])


@pytest.mark.parametrize(("page", "factor"), [(2, 3), (3, 7.5)])
def test_a_level_is_the_mean_of_what_it_covers(folder, page, factor):
    with tifffile.TiffFile(folder / "odd.svs") as file:
        full, level = (file.pages[number].asarray().astype(float) for number in (0, page))
        per_cm = [np.divide(*file.pages[number].tags["XResolution"].value) for number in (0, page)]
    mean = area_means(area_means(full, factor, level.shape[0]).swapaxes(0, 1), factor, level.shape[1]).swapaxes(0, 1)
    # JPEG costs a few grey values; a level that is shifted by one pixel is further off
    assert difference(level, mean) < 0.6 * min(difference(level, np.roll(mean, 1, axis)) for axis in (0, 1))
    assert per_cm[0] / per_cm[1] == pytest.approx(factor, rel=0.02)


def area_means(values, factor, count):
    """Means of rows over intervals with fractional ends."""
    total = np.concatenate([np.zeros((1, *values.shape[1:])), values.cumsum(0)])
    edges = factor * np.arange(count + 1)
    whole = np.minimum(edges.astype(int), len(values) - 1)
    part = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
    return np.diff(total[whole] + part * values[whole], axis=0) / factor


def test_the_thumbnail_is_small_and_not_tiled(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom_slide, "THUMBNAIL", 50)
    write_phantom_slide(tmp_path / "a.svs", 300, 200, levels=(1, 2), tile=64)
    with tifffile.TiffFile(tmp_path / "a.svs") as file:
        assert [page.is_tiled for page in file.pages] == [True, False, True]
        assert max(file.pages[1].shape) <= 50


def test_margins_become_bounds(folder):
    with openslide.OpenSlide(folder / "bounds.scn") as slide:
        bounds = [slide.properties[f"openslide.bounds-{name}"] for name in ("y", "x", "height", "width")]
        assert bounds == ["70", "40", str(HEIGHT), str(WIDTH)]
        assert slide.dimensions == (WIDTH + 150, HEIGHT + 100)
        assert float(slide.properties["openslide.mpp-x"]) == 0.5
        image = np.asarray(slide.read_region((39, 69), 0, (3, 3)))
        np.testing.assert_array_equal(image[..., 3] == 255, [[False] * 3, [False, True, True], [False, True, True]])


@pytest.mark.parametrize("blank", [0, 0.2, 0.7, 1])
def test_share_of_glass(blank):
    mask = SlideTissue.random(700, 500, seed=1, blank=blank).classes(0, 0, 700, 500)
    assert (mask == WHITE).mean() == (blank if blank in (0, 1) else pytest.approx(blank, abs=0.03))


def test_same_seed_same_file(folder, tmp_path):
    write_phantom_slide(tmp_path / "again.scn", HEIGHT, WIDTH, seed=3, levels=(1, 2), margins=(70, 40, 30, 110))
    assert (tmp_path / "again.scn").read_bytes() == (folder / "bounds.scn").read_bytes()


def test_memory_does_not_grow_with_the_slide(tmp_path):
    def peak(side):
        tracemalloc.start()
        write_phantom_slide(
            tmp_path / "large.svs", side, side, tile=128, levels=(1, 4), mask_path=tmp_path / "mask.tif"
        )
        value = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return value

    peak(600)  # what is loaded once
    assert peak(1800) < 1.5 * peak(900)  # four times the pixels; thumbnails differ, and how many regions a tile cuts


def test_a_failed_write_leaves_nothing(tmp_path):
    def stop(share):
        if share > 0.9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom_slide(tmp_path / "a.svs", 200, 200, mask_path=tmp_path / "m.tif", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_rises_to_one(tmp_path):
    shares = []
    write_phantom_slide(tmp_path / "a.svs", 300, 200, tile=64, mask_path=tmp_path / "m.tif", progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"height": 20}, "smallest side is 32"),
        ({"um_per_px": 5}, "0.1..4"),
        ({"tile": 100}, "multiple of 16"),
        ({"blank": 1.5}, "0..1"),
        ({"levels": (1, 16)}, "at most 8 times"),
        ({"levels": (2, 4)}, "increasing from 1"),
        ({"levels": (1, 8, 64, 512)}, "leave out the last"),
        ({"margins": (0, -1, 0, 0)}, "negative"),
    ],
)
def test_bad_options(tmp_path, options, part):
    with pytest.raises(InputError, match=part):
        write_phantom_slide(tmp_path / "a.svs", **{"height": 100, "width": 100, **options})
    assert list(tmp_path.iterdir()) == []
