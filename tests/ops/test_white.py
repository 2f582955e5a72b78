from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.errors import InputError
from tissuehint.ops.white import white_fraction, white_mask, white_masks


def picture(seed: int, height: int = 40, width: int = 31) -> np.ndarray:
    """Blotches of 4 px around the threshold, so that spots of every size occur."""
    values = np.random.default_rng(seed).integers(150, 256, (height // 4 + 1, width // 4 + 1, 3))
    return values.repeat(4, 0).repeat(4, 1)[:height, :width].astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 17, 50, 80]))
def test_white_mask_is_remove_small_objects_of_scikit_image(seed, min_area):
    from skimage.morphology import remove_small_objects

    image = picture(seed)
    bright = image.astype(int) @ (299, 587, 114) > 200_000
    newer = "max_size" in signature(remove_small_objects).parameters  # scikit-image 0.26 renamed it
    size = {"max_size": min_area - 1} if newer else {"min_size": min_area}
    expected = remove_small_objects(bright, connectivity=1, **size)
    np.testing.assert_array_equal(white_mask(image, min_area=min_area), expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4), st.sampled_from([0, 50]))
def test_batch_equals_images_one_by_one(seeds, min_area):
    images = [picture(seed) for seed in seeds]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    expected = np.stack([white_mask(image, min_area=min_area) for image in images])
    np.testing.assert_array_equal(white_masks(batch, min_area=min_area).numpy(), expected)


def test_float_image_equals_bytes():
    image = picture(3)
    np.testing.assert_array_equal(white_mask(image / 255), white_mask(image))


@pytest.mark.parametrize(("grey", "white"), [(199, False), (200, False), (201, True), (255, True)])
def test_threshold_itself_is_not_white(grey, white):
    image = np.full((10, 10, 3), grey, np.uint8)
    assert white_mask(image).all() == white
    assert white_masks(torch.from_numpy(image / 255).permute(2, 0, 1)[None]).all().item() == white
    assert white_fraction(image) == float(white)


def test_pixels_that_touch_at_a_corner_are_two_spots():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = image[2:, 2:] = 255
    assert white_mask(image, min_area=4).sum() == 8
    assert white_mask(image, min_area=5).sum() == 0


def test_spots_of_neighbouring_images_don_t_join():
    images = torch.ones(2, 3, 5, 5)
    assert not white_masks(images, min_area=26).any()
    assert white_masks(images, min_area=25).all()


def test_white_fraction_counts_spots_of_any_size():
    image = np.zeros((4, 5, 3), np.uint8)
    image[0, 0] = 255
    assert white_fraction(image) == 1 / 20


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.full((4, 4, 3), 255.0), np.zeros((4, 4, 3), np.int64)],
    ids=["grey", "float of bytes", "wide integers"],
)
def test_no_rgb_image_is_refused(image):
    with pytest.raises(InputError, match="image: "):
        white_mask(image)


def test_batch_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"\(batch, 3, height, width\)"):
        white_masks(torch.zeros(3, 4, 4))
