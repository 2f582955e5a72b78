import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

from tissuehint.data import phantom_slide_tissue
from tissuehint.data.phantom_slide import write_phantom_slide
from tissuehint.errors import InputError
from tissuehint.slides import reader
from tissuehint.slides.coordinates import Box, Placement
from tissuehint.slides.reader import open_slide

HEIGHT, WIDTH = 524, 640  # whole at a half and at a quarter
MARGINS = (70, 40, 30, 110)
TOP, LEFT = MARGINS[:2]
REAL = os.environ.get("TISSUEHINT_DATA")
needs_real = pytest.mark.skipif(REAL is None, reason="TISSUEHINT_DATA is not set: no real slides")


def reduced(image, factor):
    """Level of a pyramid: mean over whole factors, rest cut off."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(blocks.mean((1, 3))).astype(np.uint8)


def write_tiff(path, image, factors=(1,), *, description=None, resolution=(20000, 20000), unit="CENTIMETER", **options):
    options = {"tile": (64, 64), "compression": "zlib", "photometric": "rgb", "metadata": None, **options}
    with tifffile.TiffWriter(path) as file:
        for factor in factors:
            per_unit = tuple(value / factor for value in resolution)
            text = description if factor == 1 else None
            kind = int(factor > 1 and description is None)
            file.write(
                reduced(image, factor),
                description=text,
                resolution=per_unit,
                resolutionunit=unit,
                subfiletype=kind,
                software=False,
                **options,
            )
            if factor == 1 and description is not None:
                thumbnail = np.zeros((8, 8, 3), np.uint8)
                file.write(thumbnail, photometric="rgb", metadata=None, software=False)


def write_aperio(path, image, factors=(1,), mpp="0.5"):
    text = f"Aperio Image Library\r\n{image.shape[1]}x{image.shape[0]} (64x64)|AppMag = 20"
    write_tiff(path, image, factors, description=text + (f"|MPP = {mpp}" if mpp else ""))


def write_ome(path, image):
    """Lower levels in SubIFDs, where OpenSlide does not look."""
    with tifffile.TiffWriter(path, ome=True) as file:
        options = {"tile": (64, 64), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
        file.write(image, subifds=1, resolution=(20000, 20000), **options)
        file.write(reduced(image, 2), subfiletype=1, resolution=(10000, 10000), **options)


@pytest.fixture(scope="module")
def image():
    """Structures of all sizes: smooth blobs, and noise of a few grey values."""
    generator = np.random.default_rng(5)
    smooth = gaussian_filter(generator.normal(size=(HEIGHT, WIDTH, 3)), (3, 3, 0))
    return np.clip(128 + 500 * smooth + generator.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, image):
    folder = tmp_path_factory.mktemp("slides")
    write_tiff(folder / "generic.tif", image, (1, 2, 4))
    write_aperio(folder / "aperio.svs", image, (1, 2, 4))
    write_ome(folder / "ome.tif", image)
    write_tiff(folder / "strips.tif", image, tile=None, rowsperstrip=50)
    Image.fromarray(image).save(folder / "plain.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom_slide_tissue, "TEXTURE", 96)
        write_phantom_slide(folder / "odd.svs", HEIGHT, WIDTH, seed=3, levels=(1, 3, 7.5), blank=0.2)
        write_phantom_slide(folder / "bounds.scn", HEIGHT, WIDTH, seed=3, levels=(1, 2), margins=MARGINS, blank=0.2)
    return folder


@pytest.fixture(scope="module")
def slides(folder):
    """Slides by file name, open over the examples of hypothesis."""
    opened = {path.name: open_slide(path, um_per_px=0.5) for path in folder.iterdir()}
    yield opened
    for slide in opened.values():
        slide.close()


FILES = {
    "generic.tif": ("openslide", 3),
    "aperio.svs": ("openslide", 3),
    "ome.tif": ("tiffslide", 2),
    "strips.tif": ("tiffslide", 1),
    "plain.png": ("image", 1),
}


@pytest.mark.parametrize("name", FILES)
def test_each_file_has_its_reader(folder, name):
    with open_slide(folder / name, um_per_px=0.5) as slide:
        assert (slide.reader, len(slide.levels)) == FILES[name]
        assert slide.shape == (HEIGHT, WIDTH)
        assert slide.name == name.rpartition(".")[0]
        assert slide.bounds == Box(0, 0, HEIGHT, WIDTH)
        assert slide.um_per_px == 0.5


@pytest.mark.parametrize("name", FILES)
@given(st.data())
@settings(max_examples=15)
def test_native_pixels_are_exact(slides, image, name, data):
    top, left = data.draw(st.integers(-50, HEIGHT + 20)), data.draw(st.integers(-50, WIDTH + 20))
    height, width = data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120))
    pixels = slides[name].read(Box(top, left, height, width), 0.5)
    padded = np.pad(image, ((200, 200), (200, 200), (0, 0)), constant_values=255)
    np.testing.assert_array_equal(pixels, padded[200 + top :, 200 + left :][:height, :width])


@pytest.mark.parametrize("name", ["generic.tif", "aperio.svs", "ome.tif"])
def test_pixels_at_the_size_of_a_level_are_exact(slides, image, name):
    pixels = slides[name].read(Box(40, 60, 200, 300), 1.0)
    np.testing.assert_array_equal(pixels, reduced(image, 2)[20:120, 30:180])


@pytest.mark.parametrize("name", [*FILES, "odd.svs", "bounds.scn"])
@given(st.data())
@settings(max_examples=25)
def test_a_large_box_equals_small_boxes(slides, name, data):
    slide = slides[name]
    scale = data.draw(st.floats(0.4, 12) | st.sampled_from([1, 2, 3, 7.5]))
    whole = data.draw(st.booleans()) and scale == int(scale)
    start = st.integers(-40, 500) if whole else st.floats(-40, 500)
    top, left = data.draw(start), data.draw(start)
    height, width = data.draw(st.integers(2, 60)), data.draw(st.integers(2, 60))
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    tall, wide = data.draw(st.integers(1, height - row)), data.draw(st.integers(1, width - column))
    large = slide.resample(Box(top, left, height * scale, width * scale), height, width)
    box = Box(top + row * scale, left + column * scale, tall * scale, wide * scale)
    difference = np.abs(slide.resample(box, tall, wide).astype(int) - large[row : row + tall, column : column + wide])
    # OpenSlide mixes neighbours a little where a level pixel does not begin at a whole level-0 pixel
    assert difference.max() <= (3 if name == "odd.svs" else 2)


@pytest.mark.parametrize("name", ["generic.tif", "strips.tif", "odd.svs"])
def test_bands_do_not_show(slides, name, monkeypatch):
    slide, box = slides[name], Box(-13.7, 21.2, 500, 600)
    whole = slide.resample(box, 130, 170)
    monkeypatch.setattr(reader, "BAND", 20_000)
    np.testing.assert_allclose(slide.resample(box, 130, 170), whole, atol=2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("scale", [1.3, 2.6, 5.2, 11])
def test_pixels_are_means_of_their_area(slides, image, name, scale):
    height, width = 30, 40
    pixels = slides[name].resample(Box(7.3, 11.9, height * scale, width * scale), height, width)
    expected = _area_means(image, 7.3, 11.9, scale, height, width)
    difference = pixels - expected
    assert np.abs(difference).mean() < 4
    assert abs(difference.mean()) < 0.5


def _area_means(image, top, left, scale, height, width):
    """Exact means over boxes with fractional borders, through integrals along one axis after the other."""

    def along(values, start, count):
        total = np.concatenate([np.zeros((1, *values.shape[1:])), values.cumsum(0)])
        edges = start + scale * np.arange(count + 1)
        whole = np.floor(edges).astype(int)
        part = (edges - whole).reshape(-1, *[1] * (values.ndim - 1))
        at = total[whole] + part * values[np.minimum(whole, len(values) - 1)]
        return np.diff(at, axis=0) / scale

    rows = along(image.astype(float), top, height)
    return along(rows.swapaxes(0, 1), left, width).swapaxes(0, 1)


@pytest.mark.parametrize("scale", [2.0, 2.6, 3.5])
def test_nothing_aliases(tmp_path, scale):
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[::2] = 255
    write_tiff(tmp_path / "stripes.tif", stripes)
    with open_slide(tmp_path / "stripes.tif") as slide:
        pixels = slide.resample(Box(3, 3, 100 * scale, 20 * scale), 100, 20)
    assert pixels.std() < 20  # every other pixel alone would give 127
    assert pixels.mean() == pytest.approx(127.5, abs=1)


def test_finer_than_the_slide(slides, image):
    pixels = slides["plain.png"].read(Box(100, 100, 50, 60), 0.25)
    assert pixels.shape == (100, 120, 3)
    np.testing.assert_allclose(reduced(pixels, 2).astype(float), image[100:150, 100:160], atol=25)
    assert np.abs(reduced(pixels, 2).astype(float) - image[100:150, 100:160]).mean() < 3


def test_size_of_what_is_read(slides):
    slide = slides["generic.tif"]
    assert slide.read(Box(0, 0, 100, 50.4), 1.0).shape == (50, 25, 3)
    assert slide.read(Box(0, 0, 0.1, 30), 4.0).shape == (1, 4, 3)
    assert slide.thumbnail(100).shape == (82, 100, 3)
    assert slide.thumbnail(5000).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("name", FILES)
def test_outside_is_white(slides, name):
    slide = slides[name]
    for box in (Box(-300, 0, 100, 100), Box(0, WIDTH + 50, 90, 90), Box(9000, 9000, 50, 50)):
        assert (slide.resample(box, 33, 33) == 255).all()
    pixels = slide.resample(Box(HEIGHT - 40, 0, 80, 80), 20, 20)
    assert (pixels[11:] == 255).all()
    assert pixels[:9].mean() < 200


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.full((40, 40, 4), (100, 0, 200, 255), np.uint8)
    pixels[:, 20:, 3] = 51
    Image.fromarray(pixels).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png") as slide:
        read = slide.resample(Box(0, 0, 40, 40), 40, 40)
    assert read[0, 0].tolist() == [100, 0, 200]
    assert read[0, 30].tolist() == [224, 204, 244]  # a fifth of the colour, four fifths of white


def test_bounds(slides, folder):
    slide = slides["bounds.scn"]
    assert slide.bounds == Box(TOP, LEFT, HEIGHT, WIDTH)
    assert slide.shape == (HEIGHT + 100, WIDTH + 150)
    assert slide.corner("slide") == (0, 0)
    assert slide.corner("bounds") == (TOP, LEFT)
    pixels = slide.resample(Box(0, 0, *slide.shape), *slide.shape)
    inside = pixels[TOP : TOP + HEIGHT, LEFT : LEFT + WIDTH]
    assert (pixels[:TOP] == 255).all()
    assert (pixels[:, :LEFT] == 255).all()
    with tifffile.TiffFile(folder / "bounds.scn") as file:
        np.testing.assert_allclose(inside.astype(int), file.pages[1].asarray(), atol=3)


@pytest.mark.parametrize(("name", "um_per_px"), [("bounds.scn", 1.3), ("odd.svs", 0.9), ("odd.svs", 3.75)])
@given(st.data())
@settings(max_examples=15)
def test_a_map_lies_where_it_was_read(slides, name, um_per_px, data):
    """Round trip: the pixel of a map, read alone through its place on the slide, is the pixel of the whole map."""
    slide = slides[name]
    top, left = slide.corner("bounds")
    place = Placement(um_per_px, um_per_px / slide.um_per_px, top, left)
    whole = slide.read(place.box(0, 0, 60, 50), um_per_px).astype(int)
    row, column = data.draw(st.integers(0, 59)), data.draw(st.integers(0, 49))
    back = place.to_map(*place.to_slide(float(row), float(column)))
    np.testing.assert_allclose(back, (row, column), atol=1e-9)
    np.testing.assert_allclose(slide.read(place.box(row, column, 1, 1), um_per_px)[0, 0], whole[row, column], atol=2)


def test_levels(folder, tmp_path, image):
    with open_slide(folder / "odd.svs") as slide:
        assert [(level.height, level.width) for level in slide.levels] == [(524, 640), (174, 213), (69, 85)]
        assert [level.downsample for level in slide.levels] == pytest.approx([1, 3, (524 / 69 + 640 / 85) / 2])
        assert slide.levels[1].downsample == 3
    write_tiff(tmp_path / "cut.tif", image[:523, :639], (1, 4))
    with open_slide(tmp_path / "cut.tif") as slide:
        assert slide.levels[1].downsample == 4  # 523 / 130 is 4.023


def test_the_coarsest_sufficient_level_is_read(tmp_path, image):
    """Levels of one grey each show which was read."""
    with tifffile.TiffWriter(tmp_path / "grey.tif") as file:
        for number, factor in enumerate((1, 2, 4)):
            level = np.full_like(reduced(image, factor), 50 * number)
            file.write(level, tile=(64, 64), photometric="rgb", metadata=None, subfiletype=int(number > 0))
    with open_slide(tmp_path / "grey.tif") as slide:
        for scale, grey in ((0.5, 0), (1, 0), (1.9, 0), (1.99, 50), (2, 50), (3.9, 50), (3.99, 100), (7, 100)):
            assert (slide.resample(Box(100, 100, 20 * scale, 20 * scale), 20, 20) == grey).all(), scale


@pytest.mark.parametrize("mpp", [None, "0", "-1", "nan", "150", "what"])
def test_missing_pixel_size_names_the_fix(tmp_path, image, mpp):
    write_aperio(tmp_path / "a.svs", image, mpp=mpp)
    with open_slide(tmp_path / "a.svs") as slide:
        assert slide.thumbnail(64).shape == (52, 64, 3)
        with pytest.raises(InputError, match=r"a\.svs.*no microns per pixel; give --mpp, or a column mpp in a CSV"):
            _ = slide.um_per_px
        with pytest.raises(InputError, match="--mpp"):
            slide.read(Box(0, 0, 10, 10), 0.5)
    with open_slide(tmp_path / "a.svs", um_per_px=0.25) as slide:
        assert slide.um_per_px == 0.25
        assert slide.read(Box(0, 0, 10, 20), 0.5).shape == (5, 10, 3)
    with open_slide(tmp_path / "a.svs", default_um_per_px=0.25) as slide:
        assert (slide.um_per_px, slide.takes_default) == (0.25, True)
    with open_slide(tmp_path / "a.svs", um_per_px=0.5, default_um_per_px=0.25) as slide:
        assert (slide.um_per_px, slide.takes_default) == (0.5, False)


def test_a_default_pixel_size_changes_nothing_for_a_slide_that_states_its_own(tmp_path, image):
    write_aperio(tmp_path / "a.svs", image, mpp="0.4")
    with open_slide(tmp_path / "a.svs", default_um_per_px=0.25) as slide:
        assert (slide.um_per_px, slide.takes_default) == (0.4, False)
    with pytest.raises(InputError, match="0 um/px"):
        open_slide(tmp_path / "a.svs", default_um_per_px=0)


def test_an_ome_tiff_opens_no_other_file(tmp_path):
    """It may say that its pixels lie elsewhere; one that was renamed still reads itself."""
    pixels = np.full((128, 128, 3), (11, 22, 33), np.uint8)
    (tmp_path / "secret").mkdir()
    tifffile.imwrite(tmp_path / "secret" / "x.tif", pixels, photometric="rgb")

    def ome(name, uuid):
        return (
            '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
            'SizeX="128" SizeY="128" SizeC="3" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
            f'<TiffData IFD="0" PlaneCount="1"><UUID FileName="{name}">{uuid}</UUID></TiffData></Pixels></Image></OME>'
        )

    for name, described in {
        "away.tif": ome("secret/x.tif", "urn:uuid:2"),
        "own.tif": ome("b.tif", "urn:uuid:1"),
    }.items():
        tifffile.imwrite(tmp_path / name, 0 * pixels, photometric="rgb", description=described, metadata=None)
    # OpenSlide refuses TIFFs in strips, so that tiffslide gets them
    with pytest.raises(InputError, match=r"away\.tif.*one of several files.*secret/x\.tif"):
        open_slide(tmp_path / "away.tif")
    with open_slide(tmp_path / "own.tif", um_per_px=0.5) as slide:
        assert slide.reader == "tiffslide"
        assert (slide.read(Box(0, 0, 128, 128), 0.5) == 0).all()


@pytest.mark.parametrize("tile", [(64, 64), None])
@pytest.mark.parametrize(
    ("resolution", "unit", "expected"),
    [
        ((20000, 20000), "CENTIMETER", 0.5),
        ((20000, 20100), "CENTIMETER", 0.49875),
        ((118.11, 118.11), "CENTIMETER", None),
        ((20000, 20000), "INCH", None),
        ((300, 300), "INCH", None),
        ((72, 72), "INCH", None),
        ((1, 1), "NONE", None),
    ],
)
def test_resolution_tags_count_only_where_plausible(tmp_path, image, tile, resolution, unit, expected):
    options = {} if tile else {"tile": None, "rowsperstrip": 50}
    write_tiff(tmp_path / "a.tif", image, resolution=resolution, unit=unit, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        if expected is None:
            with pytest.raises(InputError, match="no microns per pixel"):
                _ = slide.um_per_px
        else:
            assert slide.um_per_px == pytest.approx(expected, abs=1e-4)


def test_pillow_reads_the_tags_too(tmp_path, image):
    palette = Image.fromarray(image).quantize(200)
    palette.save(tmp_path / "a.tif", resolution=20000, resolution_unit="cm")
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.reader, slide.um_per_px) == ("image", 0.5)
        pixels = slide.resample(Box(0, 0, HEIGHT, WIDTH), HEIGHT, WIDTH)
        np.testing.assert_array_equal(pixels, np.asarray(palette.convert("RGB")))


def test_pixels_that_are_not_square(tmp_path, image):
    write_tiff(tmp_path / "a.tif", image, resolution=(20000, 25000))
    with open_slide(tmp_path / "a.tif") as slide, pytest.raises(InputError, match=r"0\.5 um/px across and 0\.4 down"):
        _ = slide.um_per_px
    assert open_slide(tmp_path / "a.tif", um_per_px=0.5).um_per_px == 0.5


@pytest.mark.parametrize("um_per_px", [0, -0.5, float("nan"), float("inf"), 101])
def test_given_pixel_size_is_checked(folder, um_per_px):
    with pytest.raises(InputError, match="micrometres per pixel"):
        open_slide(folder / "odd.svs", um_per_px=um_per_px)


def test_a_read_needs_a_pixel_size(slides):
    with pytest.raises(InputError, match="not above 0"):
        slides["odd.svs"].read(Box(0, 0, 10, 10), 0)


def _bad_file(kind, folder, target):
    data = (folder / "odd.svs").read_bytes()
    if kind == "folder":
        target.mkdir()
    elif kind == "jpeg":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(target, format="JPEG")
    elif kind == "deep":
        tifffile.imwrite(target, np.zeros((40, 40), np.uint16))
    elif kind != "missing":
        content = {
            "empty": b"",
            "text": b"hello " * 99,
            "truncated": data[:-9000],
            "last byte": data[:-1],
            "head": data[:50],
        }
        target.write_bytes(content[kind])


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("missing", "does not exist; check the path"),
        ("folder", "is a folder"),
        ("empty", "empty"),
        ("text", "in no format that OpenSlide, tiffslide or Pillow reads"),
        ("jpeg", r"is a JPEG image with the name of a slide \(\.svs\)"),
        ("truncated", r"truncated TIFF of \d+ bytes \(a directory lies beyond its end"),
        ("last byte", r"truncated TIFF of \d+ bytes \(its pixels should end at byte"),
        ("head", r"truncated TIFF of 50 bytes \(a directory lies beyond its end"),
        ("deep", "8 bits"),
    ],
)
def test_bad_files(folder, tmp_path, kind, part):
    _bad_file(kind, folder, tmp_path / "bad.svs")
    with pytest.raises(InputError, match=r"bad\.svs: .*" + part):
        open_slide(tmp_path / "bad.svs")


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_truncated_plain_image(tmp_path, image, format):
    Image.fromarray(image).save(tmp_path / "whole.bin", format=format)
    data = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / f"a.{format}").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged or truncated"):
        open_slide(tmp_path / f"a.{format}")


def test_bigtiff_may_be_truncated_too(tmp_path, image):
    with tifffile.TiffWriter(tmp_path / "big.tif", bigtiff=True) as file:
        for factor in (1, 2):
            options = {"photometric": "rgb", "metadata": None, "subfiletype": factor - 1}
            file.write(reduced(image, factor), tile=(64, 64), **options)
    with open_slide(tmp_path / "big.tif") as slide:
        assert [level.downsample for level in slide.levels] == [1, 2]
    data = (tmp_path / "big.tif").read_bytes()
    for length, part in ((len(data) - 100, "pixels should end"), (len(data) // 2, "a directory lies beyond its end")):
        (tmp_path / "big.tif").write_bytes(data[:length])
        with pytest.raises(InputError, match=f"truncated TIFF .*{part}"):
            open_slide(tmp_path / "big.tif")


@pytest.fixture
def no_openslide(monkeypatch):
    def refuse(path):
        raise openslide.OpenSlideUnsupportedFormatError("refused")

    monkeypatch.setattr(openslide, "OpenSlide", refuse)


def test_tiffslide_gives_the_same(folder, slides, no_openslide):
    with open_slide(folder / "odd.svs") as slide, tifffile.TiffFile(folder / "odd.svs") as file:
        assert (slide.reader, slide.um_per_px, slide.levels) == ("tiffslide", 0.5, slides["odd.svs"].levels)
        pages = [file.pages[number].asarray() for number in (0, 2, 3)]
        for level, pixels in zip(slide.levels, pages, strict=True):
            scale = level.downsample
            for top, left in ((0, 0), (7, 11), (20, 30), (37, 53)):
                read = slide.resample(Box(top * scale, left * scale, 31 * scale, 29 * scale), 31, 29)
                np.testing.assert_array_equal(read, pixels[top : top + 31, left : left + 29])
        box = Box(-20.3, 30.1, 400, 500)
        same = slides["odd.svs"].resample(box, 100, 125).astype(int)
        np.testing.assert_allclose(slide.resample(box, 100, 125).astype(int), same, atol=4)


@pytest.mark.parametrize("name", ["odd.svs", "strips.tif"])
def test_damage_is_told_and_the_slide_still_reads_elsewhere(folder, tmp_path, name):
    data = bytearray((folder / name).read_bytes())
    with tifffile.TiffFile(folder / name) as file:
        start, count = file.pages[0].dataoffsets[2], file.pages[0].databytecounts[2]
    data[start : start + count] = bytes(count)
    target = tmp_path / name
    target.write_bytes(data)
    (row, column), whole = (
        ((0, 2), Box(0, 0, HEIGHT, WIDTH)) if name == "odd.svs" else ((2, 0), Box(0, 0, HEIGHT, WIDTH))
    )
    side = 256 if name == "odd.svs" else 50
    with open_slide(target, um_per_px=0.5) as slide, open_slide(folder / name, um_per_px=0.5) as good:
        for _ in range(2):
            with pytest.raises(InputError, match=r"damaged or truncated \(.*copy the slide again"):
                slide.read(whole, 0.5)
        elsewhere = Box(0, 0, side, side)
        np.testing.assert_array_equal(slide.read(elsewhere, 0.5), good.read(elsewhere, 0.5))
        target.write_bytes((folder / name).read_bytes())
        there = Box(row * side, column * side, 20, 20)
        np.testing.assert_array_equal(slide.read(there, 0.5), good.read(there, 0.5))


def test_a_slide_that_is_deleted_or_replaced_while_open(folder, tmp_path, image):
    target = tmp_path / "a.svs"
    target.write_bytes((folder / "odd.svs").read_bytes())
    slide = open_slide(target)
    slide.close()
    target.unlink()
    with pytest.raises(InputError, match="does not exist"):
        slide.thumbnail(50)
    write_aperio(target, image[:300])
    with pytest.raises(InputError, match="another slide"):
        slide.thumbnail(50)


@pytest.mark.parametrize("name", ["odd.svs", "ome.tif", "plain.png"])
def test_threads_read_the_same(folder, slides, name):
    boxes = [Box(row * 37.0, column * 41.0, 100, 90) for row in range(6) for column in range(6)]
    expected = [slides[name].read(box, 0.7) for box in boxes]
    with open_slide(folder / name, um_per_px=0.5) as slide:
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(lambda box: slide.read(box, 0.7), boxes))
        np.testing.assert_array_equal(read, expected)


def test_each_thread_opens_for_itself_and_close_closes_all(folder, monkeypatch):
    opened = []
    real = reader.open_handle

    def counted(path):
        opened.append(real(path))
        return opened[-1]

    monkeypatch.setattr(reader, "open_handle", counted)
    slide = open_slide(folder / "odd.svs")
    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            pool.submit(slide.thumbnail, 40).result()
            slide.thumbnail(40)
        assert len(opened) == 2
        slide.close()
        assert all(handle.closed for handle in opened)
        pool.submit(slide.thumbnail, 40).result()
        assert len(opened) == 3
        slide.close()
        assert all(handle.closed for handle in opened)


def _thumbnail(slide, answer=None):
    """Also how often it took opening the file."""
    opened, real = [], reader.open_handle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "open_handle", lambda path: opened.append(path) or real(path))
        found = slide.thumbnail(99), slide.um_per_px, slide.bounds, len(opened)
    return found if answer is None else answer.send(found)


@pytest.mark.parametrize("name", ["bounds.scn", "ome.tif", "plain.png"])
def test_survives_pickling_and_a_fork(slides, name):
    slide = slides[name]
    slide.thumbnail(9)
    expected = _thumbnail(slide)
    assert expected[3] == 0
    with pickle.loads(pickle.dumps(slide)) as copied:
        found = [_thumbnail(copied)]
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_thumbnail, args=(slide, theirs))
    process.start()
    assert ours.poll(60)
    found.append(ours.recv())
    process.join(60)
    for thumbnail, um_per_px, bounds, opened in found:
        np.testing.assert_array_equal(thumbnail, expected[0])
        assert (um_per_px, bounds) == expected[1:3]
        assert opened == 1


@needs_real
def test_real_slide_with_pixel_size():
    with open_slide(Path(REAL) / "slides" / "CMU-1-Small-Region.svs") as slide:
        assert (slide.reader, slide.shape, slide.um_per_px) == ("openslide", (2967, 2220), 0.499)
        large = slide.read(Box(500, 500, 800, 800), 1.1).astype(int)
        scale = 1.1 / slide.um_per_px
        small = slide.read(Box(500 + 100 * scale, 500 + 50 * scale, 120 * scale, 90 * scale), 1.1)
        assert np.abs(large[100:220, 50:140] - small).max() <= 12  # 363 pixels for 362.9: a thousandth larger
        assert np.abs(large[100:220, 50:140] - small).mean() < 1


@needs_real
def test_real_slide_without_pixel_size():
    path = Path(REAL) / "slides" / "tcga-cr-7395-01a-01-ts1.svs"
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [1, 2]
        assert slide.thumbnail(500).shape == (401, 500, 3)
        with pytest.raises(InputError, match="--mpp"):
            _ = slide.um_per_px
    with open_slide(path, um_per_px=0.25) as slide:
        assert slide.read(Box(0, 0, 400, 600), 0.5).shape == (200, 300, 3)
