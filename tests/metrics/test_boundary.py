import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from tissuehint.errors import InputError
from tissuehint.metrics import (
    boundary_counts,
    boundary_distance,
    boundary_iou,
    boundary_iou_from_counts,
    boundary_iou_per_image,
    confusion_matrix,
    scores,
)

C = 3


@st.composite
def image_pairs(draw, ignore=False):
    side = st.integers(1, 14)
    shape = (draw(side), draw(side))
    # blocks of a few pixels, so that interiors exist
    block = draw(st.integers(1, 7))
    small = tuple(-(-length // block) for length in shape)
    values = [*range(C), 255] if ignore else [*range(C)]
    maps = [
        np.kron(
            draw(arrays.arrays(np.uint8, small, elements=st.sampled_from(allowed))), np.ones((block, block), np.uint8)
        )
        for allowed in ([*range(C)], values)
    ]
    return tuple(values[: shape[0], : shape[1]] for values in maps)


def band_by_definition(mask, distance):
    """Mask minus its erosion by `distance` steps of a 3x3 square, zeros outside the image."""
    eroded = mask
    for _ in range(distance):
        eroded = ndimage.binary_erosion(eroded, np.ones((3, 3)), border_value=0)
    return mask & ~eroded


def counts_by_definition(prediction, target, distance):
    valid = target != 255
    rows = []
    for label in range(C):
        true = band_by_definition((target == label) & valid, distance)
        predicted = band_by_definition((prediction == label) & valid, distance)
        rows.append([(true & predicted).sum(), (true | predicted).sum()])
    return np.array(rows).T


@settings(max_examples=200)
@given(image_pairs(ignore=True), st.integers(1, 8))
def test_counts_equal_repeated_erosion_by_a_3x3_square(pair, distance):
    np.testing.assert_array_equal(boundary_counts(*pair, C, distance), counts_by_definition(*pair, distance))


def test_counts_equal_repeated_erosion_at_patch_size():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, C, (14, 14))
    target = np.kron(blocks, np.ones((16, 16), np.int64))
    prediction = np.roll(target, (3, -2), (0, 1))
    np.testing.assert_array_equal(boundary_counts(prediction, target, C), counts_by_definition(prediction, target, 6))


@given(image_pairs())
def test_infinite_distance_gives_iou(pair):
    iou = scores(confusion_matrix(*pair, C))["iou"]
    np.testing.assert_array_equal(boundary_iou(*pair, C, math.inf), iou)
    np.testing.assert_array_equal(boundary_iou(*pair, C, 10**6), iou)


@given(image_pairs(), st.integers(1, 5))
def test_identity_gives_one_and_absent_classes_nan(pair, distance):
    target = pair[1]
    result = boundary_iou(target, target, C, distance)
    np.testing.assert_array_equal(result, [1.0 if (target == label).any() else np.nan for label in range(C)])


@given(image_pairs(ignore=True), st.integers(1, 5))
def test_flips_turns_and_exchange_change_nothing(pair, distance):
    expected = boundary_counts(*pair, C, distance)
    for move in (np.flipud, np.fliplr, np.rot90):
        np.testing.assert_array_equal(boundary_counts(*map(move, pair), C, distance), expected)
    prediction, target = pair
    if not (target == 255).any():
        np.testing.assert_array_equal(boundary_counts(target, prediction, C, distance), expected)


def test_image_border_is_in_the_band():
    whole = np.zeros((10, 12), np.uint8)
    assert boundary_counts(whole, whole, 1, 2)[1, 0] == 10 * 12 - 6 * 8


def test_ignored_pixels_are_counted_nowhere_and_end_the_classes_beside_them():
    target = np.zeros((9, 9), np.uint8)
    target[4, 4] = 255
    prediction = np.zeros_like(target)
    prediction[4, 4] = 77
    counts = boundary_counts(prediction, target, 1, 1)
    # the frame of the image, and the eight neighbours of the ignored pixel
    np.testing.assert_array_equal(counts, [[32 + 8], [32 + 8]])


@given(st.lists(image_pairs(ignore=True), min_size=1, max_size=3))
def test_batches_pool_counts_and_list_images(pairs):
    height, width = (min(pair[0].shape[axis] for pair in pairs) for axis in (0, 1))
    prediction, target = (np.stack([pair[side][:height, :width] for pair in pairs]) for side in (0, 1))
    one_by_one = [boundary_counts(p, t, C, 2) for p, t in zip(prediction, target, strict=True)]
    np.testing.assert_array_equal(boundary_counts(prediction, target, C, 2), sum(one_by_one))
    np.testing.assert_array_equal(boundary_iou(prediction, target, C, 2), boundary_iou_from_counts(sum(one_by_one)))
    expected = np.stack([boundary_iou_from_counts(counts) for counts in one_by_one])
    np.testing.assert_array_equal(boundary_iou_per_image(prediction, target, C, 2), expected)


def test_tensors_give_tensors():
    truth = np.zeros((8, 8), np.int64)
    truth[2:6, 2:6] = 1
    moved = np.roll(truth, 1, axis=1)
    pair = torch.from_numpy(moved), torch.from_numpy(truth)
    result = boundary_iou(*pair, 3, 1)
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float64
    np.testing.assert_array_equal(result, boundary_iou(moved, truth, 3, 1))
    assert boundary_counts(*pair, 3).dtype == torch.int64


@pytest.mark.parametrize(("size", "distance"), [((224, 224), 6), ((512, 512), 14), ((10, 10), 1), ((3000, 4000), 100)])
def test_default_distance_is_two_per_cent_of_the_diagonal(size, distance):
    assert boundary_distance(*size) == distance


@pytest.mark.parametrize("num_classes", [0, 256])
def test_classes_that_no_mask_can_hold_are_refused(num_classes):
    image = np.zeros((8, 8), np.int64)
    with pytest.raises(InputError, match=f"num_classes {num_classes}"):
        boundary_iou(image, image, num_classes)


def test_largest_number_of_classes():
    target = np.repeat(np.arange(255), 4).reshape(-1, 4)
    np.testing.assert_array_equal(boundary_counts(target, target, 255, 1), np.full((2, 255), 4))


@pytest.mark.parametrize("distance", [0, -1, 0.5, 2.5, math.nan, -math.inf])
def test_impossible_distances_are_refused(distance):
    image = np.zeros((8, 8), np.uint8)
    with pytest.raises(InputError, match="boundary distance"):
        boundary_iou(image, image, 2, distance)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (np.full((4, 4), 2), np.zeros((4, 4), int), "prediction value 2"),
        (np.zeros((4, 4), int), np.full((4, 4), 3), "target value 3"),
        (np.zeros((4, 4), int), np.zeros((4, 5), int), "shape"),
        (np.zeros(4, int), np.zeros(4, int), "shape"),
    ],
)
def test_bad_maps_are_refused(prediction, target, message):
    with pytest.raises(InputError, match=message):
        boundary_iou(prediction, target, 2)
