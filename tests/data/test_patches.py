from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tissuehint.data.patches import (
    PatchGrid,
    presence_tags,
    proportion_rows,
    resize_image,
    sliding_map,
    white_fractions,
    windows,
)
from tissuehint.data.weak import proportions_from_mask, tags_from_mask
from tissuehint.labels import LabelSpace

few = settings(max_examples=30)
SPACE = LabelSpace(("gland", "stroma", "necrosis", "white"), white=3)
lengths = st.integers(1, 60)


@st.composite
def grids(draw, **more):
    side = draw(st.integers(16, 40))
    return PatchGrid(side=side, stride=draw(st.integers(max(1, side // 4), side)), **more)


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(height * 1000 + width))


class TestWindows:
    @few
    @given(lengths, lengths, st.integers(1, 40), st.data())
    def test_they_cover_every_pixel_and_stay_inside(self, height, width, side, data):
        stride = data.draw(st.integers(1, side))
        corners = windows(height, width, side, stride)
        assert (corners >= 0).all()
        assert len({tuple(corner) for corner in corners.tolist()}) == len(corners)
        seen = np.zeros((height, width), int)
        for top, left in corners:
            seen[top : top + side, left : left + side] += 1
        assert seen.min() >= 1
        for starts, length in zip(corners.T, (height, width), strict=True):
            last = max(length - side, 0)
            assert starts.max() == last, "the last window lies flush with the border"
            assert all(start % stride == 0 for start in starts if start != last)

    def test_a_grid_that_would_lose_pixels_is_refused(self):
        with pytest.raises(ValidationError, match="stride 33 is larger than side 32"):
            PatchGrid(side=32, stride=33)


class TestSlidingMap:
    @few
    @given(lengths, lengths, grids(), st.integers(1, 7))
    def test_what_was_cut_is_stitched_back(self, height, width, grid, batch_size):
        image = random_image(height, width)
        stitched = sliding_map(lambda images, corners: images, image, grid, batch_size=batch_size)
        assert stitched.shape == image.shape
        torch.testing.assert_close(stitched, image, atol=1e-6, rtol=0)

    @few
    @given(lengths, lengths, grids(), st.integers(1, 7))
    def test_the_mapper_gets_each_window_with_its_corner(self, height, width, grid, batch_size):
        image, given_corners = random_image(height, width), []

        def mapper(images, corners):
            assert len(images) == len(corners) <= batch_size
            assert images.shape[1:] == (3, grid.side, grid.side)
            for patch, (top, left) in zip(images, corners, strict=True):
                part = image[:, top : top + grid.side, left : left + grid.side]
                assert torch.equal(patch[:, : part.shape[1], : part.shape[2]], part)
            given_corners.extend(corners)
            return images

        sliding_map(mapper, image, grid, batch_size=batch_size)
        assert given_corners == [tuple(corner) for corner in windows(height, width, grid.side, grid.stride).tolist()]

    @few
    @given(lengths, lengths, grids(), st.integers(1, 7))
    def test_overlaps_are_the_mean_of_the_windows_that_see_a_pixel(self, height, width, grid, batch_size):
        side, corners = grid.side, windows(height, width, grid.side, grid.stride).tolist()
        answers = {tuple(corner): random_image(side, side) * (1 + number) for number, corner in enumerate(corners)}
        total, seen = np.zeros((3, height, width)), np.zeros((height, width))
        for (top, left), answer in answers.items():
            for row in range(top, min(top + side, height)):
                columns = slice(left, min(left + side, width))
                total[:, row, columns] += answer[:, row - top, : min(left + side, width) - left].numpy()
                seen[row, columns] += 1

        def mapper(images, places):
            return torch.stack([answers[place] for place in places])

        stitched = sliding_map(mapper, random_image(height, width), grid, batch_size=batch_size)
        np.testing.assert_allclose(stitched.numpy(), total / seen, rtol=1e-5)

    @few
    @given(st.integers(4, 60), st.integers(4, 60), grids(), st.integers(16, 48))
    def test_resized_windows_land_on_their_pixels(self, height, width, grid, resize):
        grid = grid.model_copy(update={"resize": resize})
        rows, columns = torch.meshgrid(torch.arange(height) / 64, torch.arange(width) / 64, indexing="ij")
        image = torch.stack([rows, columns, torch.full_like(rows, 0.25)])
        shapes = set()

        def mapper(images, corners):
            shapes.add(tuple(images.shape[1:]))
            return images

        stitched = sliding_map(mapper, image, grid, batch_size=4)
        assert shapes == {(3, resize, resize)}
        torch.testing.assert_close(stitched[2], image[2], atol=1e-5, rtol=0)
        # a ramp comes back up to the blur of two resizings, which moves nothing by more than a pixel of either grid
        assert (stitched - image).abs().max() < 1.01 * max(1, grid.side / resize) / 64

    @few
    @given(lengths, lengths, grids(), st.sampled_from([None, 16, 33]))
    def test_probabilities_stay_probabilities(self, height, width, grid, resize):
        grid = grid.model_copy(update={"resize": resize})
        image = random_image(height, width)
        stitched = sliding_map(lambda images, corners: (9 * images).softmax(1), image, grid, batch_size=3)
        torch.testing.assert_close(stitched.sum(0), torch.ones(height, width))

    def test_resizing_there_and_back_shifts_nothing(self):
        ramp = torch.arange(16.0).expand(3, 16, 16)
        grid = PatchGrid(side=16, stride=16, resize=32)
        stitched = sliding_map(lambda images, corners: images, ramp, grid, batch_size=1)
        torch.testing.assert_close(stitched[..., 1:-1], ramp[..., 1:-1])

    def test_without_a_grid_the_mapper_gets_the_whole_image(self):
        image, calls = random_image(20, 31), []

        def mapper(images, corners):
            calls.append((images, corners))
            return images.half()

        stitched = sliding_map(mapper, image, None, batch_size=1)
        assert len(calls) == 1
        assert torch.equal(calls[0][0], image[None])
        assert calls[0][1] == [(0, 0)]
        assert stitched.dtype == torch.float32


def test_resizing_to_the_same_side_changes_nothing():
    images = random_image(16, 16)[None]
    assert torch.equal(resize_image(images, 16), images)


@st.composite
def masks_with_windows(draw):
    """A mask of few classes in runs, ignored pixels included, and the windows of a grid over it."""
    height, width = draw(lengths), draw(lengths)
    seed, block = draw(st.integers(0, 999)), draw(st.integers(1, 24))
    coarse = np.random.default_rng(seed).choice([0, 1, 2, 3, 255], (height // block + 1, width // block + 1))
    mask = coarse.repeat(block, 0).repeat(block, 1)[:height, :width].astype(np.uint8)
    grid = draw(grids(presence=draw(st.sampled_from([0.0, 0.05, 0.07, 0.25, 0.29, 0.5, 0.57]))))
    return mask, windows(height, width, grid.side, grid.stride), grid


class TestPresenceTags:
    @few
    @given(masks_with_windows())
    def test_against_counting_in_each_window(self, case):
        mask, corners, grid = case
        tags = presence_tags(mask, corners, grid, 3, 255)
        assert tags.shape == (len(corners), 3)
        assert tags.dtype == np.uint8
        for (top, left), row in zip(corners, tags, strict=True):
            window = mask[top : top + grid.side, left : left + grid.side]
            labelled = int((window != 255).sum())
            for label in range(3):
                count = int((window == label).sum())
                assert row[label] == (count > 0 and Fraction(count, labelled) > Fraction(str(grid.presence)))

    @pytest.mark.parametrize(("count", "presence"), [(29, 0.29), (57, 0.57), (58, 0.58), (5, 0.05)])
    def test_exactly_the_threshold_is_not_more_than_it(self, count, presence):
        # 100 labelled pixels; 0.29 * 100 is below 29 in floating point
        mask = np.full((16, 16), 255, np.uint8)
        mask.flat[:100] = 1
        mask.flat[:count] = 0
        grid = PatchGrid(side=16, stride=16, presence=presence)
        assert presence_tags(mask, np.zeros((1, 2), np.int64), grid, 3, 255)[0, 0] == 0

    @few
    @given(masks_with_windows())
    def test_a_window_is_tagged_like_an_image(self, case):
        mask, corners, grid = case
        for (top, left), row in zip(corners, presence_tags(mask, corners, grid, 3, 255), strict=True):
            window = mask[top : top + grid.side, left : left + grid.side]
            assert row.tolist() == tags_from_mask(window, SPACE, grid.presence).values.tolist()


@few
@given(masks_with_windows())
def test_proportions_of_windows_are_those_of_images(case):
    mask, corners, grid = case
    parts = [mask[top : top + grid.side, left : left + grid.side] for top, left in corners]
    held = np.array([(part < 3).any() for part in parts])
    rows = proportion_rows(mask, corners[held], grid, 3)
    assert rows.shape == (held.sum(), 3)
    for row, part in zip(rows, (part for part in parts if (part < 3).any()), strict=True):
        np.testing.assert_allclose(row, proportions_from_mask(part, SPACE).values)


@few
@given(lengths, lengths, grids(), st.integers(1, 254), st.integers(0, 99), st.booleans())
@example(20, 20, PatchGrid(side=16, stride=16), 238, 0, True)
@example(20, 20, PatchGrid(side=16, stride=16), 119, 0, True)
def test_white_is_counted_in_each_window(height, width, grid, threshold, seed, grey):
    grid = grid.model_copy(update={"white_threshold": threshold})
    channels = 1 if grey else 3
    image = np.random.default_rng(seed).integers(threshold - 1, threshold + 2, (height, width, channels))
    image = np.broadcast_to(image, (height, width, 3)).astype(np.uint8)
    # in whole numbers, where nothing is rounded
    bright = image.astype(int) @ [299, 587, 114] > 1000 * threshold
    corners = windows(height, width, grid.side, grid.stride)
    expected = [bright[top : top + grid.side, left : left + grid.side].mean() for top, left in corners]
    np.testing.assert_allclose(white_fractions(image, corners, grid), expected)
