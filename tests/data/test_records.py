import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tissuehint.data.records import Record, list_images, read_codes, read_image
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

SPACE = LabelSpace(("gland", "stroma", "white"), white=2)
RGB = np.random.default_rng(0).integers(0, 256, (9, 11, 3)).astype(np.uint8)
GREY = RGB[..., 0]


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def size(path):
    return Record("a", path).size()


def refusal(path):
    try:
        read_image(path)
    except InputError as error:
        return str(error)
    return None


def one_line(error, path) -> str:
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    return text


class TestReadImage:
    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
    def test_colours_come_back(self, tmp_path, suffix):
        image = read_image(save(tmp_path / f"a{suffix}", RGB))
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, RGB)

    def test_grey_becomes_three_equal_channels(self, tmp_path):
        np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", GREY)), np.stack([GREY] * 3, 2))

    def test_one_bit_is_black_and_white(self, tmp_path):
        bits = GREY > 127
        np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", bits)), 255 * np.stack([bits] * 3, 2))

    def test_a_palette_is_looked_up(self, tmp_path):
        picture = Image.fromarray(GREY % 3)
        picture.putpalette([10, 20, 30, 200, 100, 0, 7, 7, 7])
        picture.save(tmp_path / "a.png")
        table = np.array([[10, 20, 30], [200, 100, 0], [7, 7, 7]])
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), table[GREY % 3])

    @pytest.mark.parametrize("channels", [4, 2])
    def test_transparency_lies_on_white(self, tmp_path, channels):
        colour = RGB if channels == 4 else GREY[..., None]
        image = np.concatenate([colour, np.full((9, 11, 1), 255, np.uint8)], 2)
        image[:4, :, -1] = 0
        image[4, :, -1] = 51
        read = read_image(save(tmp_path / "a.png", image)).astype(float)
        assert (read[:4] == 255).all()
        np.testing.assert_array_equal(read[5:], np.broadcast_to(colour, RGB.shape)[5:])
        blended = 0.2 * np.broadcast_to(colour, RGB.shape)[4] + 0.8 * 255
        np.testing.assert_allclose(read[4], blended, atol=1)

    @pytest.mark.parametrize(
        ("suffix", "kind"), [(".png", np.uint16), (".tif", np.uint16), (".tif", np.int32), (".tif", np.float32)]
    )
    def test_deep_grey_is_refused_and_not_cut_to_white(self, tmp_path, suffix, kind):
        path = save(tmp_path / f"deep{suffix}", (np.arange(16).reshape(4, 4) * 4000).astype(kind))
        with pytest.raises(InputError) as error:
            read_image(path)
        assert "8 bit" in one_line(error, path)

    @pytest.mark.filterwarnings("ignore::UserWarning:PIL")
    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".tif"])
    def test_every_truncation_is_read_whole_or_refused_in_one_line(self, tmp_path, suffix):
        path = save(tmp_path / f"a{suffix}", RGB)
        data, whole = path.read_bytes(), read_image(path)
        refused = 0
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            message = refusal(path)
            if message is None:
                np.testing.assert_array_equal(read_image(path), whole)
            else:
                assert str(path) in message
                assert "\n" not in message
                refused += 1
        assert refused > 0.8 * len(data) / 7

    def test_a_picture_too_large_for_the_decoder_is_an_input_error(self, tmp_path, monkeypatch):
        path = save(tmp_path / "huge.png", RGB)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
        for read in (read_image, read_codes, size):
            with pytest.raises(InputError) as error:
                read(path)
            one_line(error, path)

    @pytest.mark.parametrize("read", [read_image, read_codes, size])
    def test_missing_and_no_image(self, tmp_path, read):
        missing, text = tmp_path / "missing.png", tmp_path / "text.png"
        text.write_text("this is\nno image")
        for path, rule in ((missing, "does not exist"), (text, "cannot be read as an image"), (tmp_path, "cannot")):
            with pytest.raises(InputError) as error:
                read(path)
            assert rule in one_line(error, path)


class TestReadCodes:
    def test_palette_indices_not_colours(self, tmp_path):
        picture = Image.fromarray(GREY)
        picture.putpalette(list(range(255, -1, -1)) * 3)
        picture.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_codes(tmp_path / "a.png"), GREY)

    def test_few_palette_indices_are_packed_and_come_back(self, tmp_path):
        picture = Image.fromarray(GREY % 3)
        picture.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
        picture.save(tmp_path / "a.png", bits=2)
        np.testing.assert_array_equal(read_codes(tmp_path / "a.png"), GREY % 3)

    @pytest.mark.parametrize(
        ("suffix", "kind"), [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8), (".tif", np.int32)]
    )
    def test_grey_values(self, tmp_path, kind, suffix):
        codes = read_codes(save(tmp_path / f"a{suffix}", GREY.astype(kind)))
        assert codes.dtype == np.uint8
        np.testing.assert_array_equal(codes, GREY)

    def test_one_bit_is_zero_and_one(self, tmp_path):
        codes = read_codes(save(tmp_path / "a.png", GREY > 127))
        np.testing.assert_array_equal(codes, (GREY > 127).astype(np.uint8))

    @pytest.mark.parametrize("value", [256, 511, -1, -256])
    def test_values_that_do_not_fit_are_refused_and_not_wrapped(self, tmp_path, value):
        path = save(tmp_path / "a.tif", np.full((3, 3), value, np.int32))
        with pytest.raises(InputError) as error:
            read_codes(path)
        assert str(value) in one_line(error, path)

    @pytest.mark.parametrize("array", [RGB, np.dstack([RGB, GREY])])
    def test_colour_is_no_mask(self, tmp_path, array):
        path = save(tmp_path / "a.png", array)
        with pytest.raises(InputError) as error:
            read_codes(path)
        assert "palette or" in one_line(error, path)

    def test_truncated(self, tmp_path):
        path = save(tmp_path / "a.png", GREY)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(InputError) as error:
            read_codes(path)
        one_line(error, path)


class TestRecord:
    def test_size_and_pixels_from_file_and_memory(self, tmp_path):
        path = save(tmp_path / "a.png", RGB)
        for image in (path, RGB):
            record = Record("a", image)
            assert record.size() == (9, 11)
            np.testing.assert_array_equal(record.read_image(), RGB)

    def test_the_mask_goes_through_the_decoder(self, tmp_path):
        path = save(tmp_path / "mask.png", np.where(GREY > 100, 255, GREY % 2).astype(np.uint8))

        def swap(codes):
            return np.where(codes < 2, 1 - codes, codes).astype(np.uint8)

        mask = Record("a", RGB, path, decode=swap).read_mask(SPACE)
        np.testing.assert_array_equal(mask, np.where(GREY > 100, 255, 1 - GREY % 2))

    def test_no_mask(self):
        with pytest.raises(InputError, match=r"^case_3: has no mask"):
            Record("case_3", RGB).read_mask(SPACE)

    @pytest.mark.parametrize("in_memory", [True, False])
    def test_a_mask_of_another_size_names_both_sizes(self, tmp_path, in_memory):
        mask = np.zeros((11, 9), np.uint8)
        record = Record("a", RGB, mask if in_memory else save(tmp_path / "m.png", mask))
        with pytest.raises(InputError, match=r"11 x 9 pixels.*its image 9 x 11") as error:
            record.read_mask(SPACE)
        one_line(error, "a" if in_memory else tmp_path / "m.png")

    def test_a_value_that_is_no_class(self, tmp_path):
        mask = np.zeros((9, 11), np.uint8)
        mask[8, 10] = 3
        path = save(tmp_path / "m.png", mask)
        with pytest.raises(InputError, match="mask value 3 is no class") as error:
            Record("a", RGB, path).read_mask(SPACE)
        one_line(error, path)


class TestListImages:
    def test_sorted_and_without_hidden_or_other_files(self, tmp_path):
        for name in ("b.PNG", "a.tif", "c.jpeg", ".a.part.png", "notes.txt"):
            (tmp_path / name).touch()
        assert [path.name for path in list_images(tmp_path)] == ["a.tif", "b.PNG", "c.jpeg"]

    def test_no_folder(self, tmp_path):
        with pytest.raises(InputError) as error:
            list_images(tmp_path / "none")
        one_line(error, tmp_path / "none")


@pytest.mark.parametrize(
    ("depth", "row"), [(2, bytes([0b00011011])), (4, bytes([0x01, 0x23])), (1, bytes([0b01010000]))]
)
def test_masks_of_few_bits_keep_their_values(tmp_path, depth, row):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 1, depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path = tmp_path / "mask.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert read_codes(path).tolist() == [[0, 1, 0, 1] if depth == 1 else [0, 1, 2, 3]]
