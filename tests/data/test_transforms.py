import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.data.samples import Sample
from tissuehint.data.training_sets import Draws, to_tensor
from tissuehint.data.transforms import Augmentation, augment, flip, rotate, zoom

few = settings(max_examples=30)
sides = st.integers(1, 12)
STILL = Augmentation(flip=False, rotate=False, brightness=0, contrast=0, saturation=0, hue=0, blur=0, scale=1)
MOVES = STILL.model_copy(update={"flip": True, "rotate": True})


def make(coded, height, width, seed=0):
    """A sample whose colours are row, column and class, with every third pixel a point; its guide repeats the image."""
    image, mask = coded(height, width, seed)
    rows, columns = np.divmod(np.arange(0, height * width, 3), width)
    points = np.stack([rows, columns, mask[rows, columns]], 1).astype(np.int64)
    picture, points = to_tensor(image), torch.from_numpy(points)
    return Sample("s", picture, torch.ones(4), points, None, torch.from_numpy(mask).long(), picture.clone())


def places(sample: Sample) -> torch.Tensor:
    """(P,3) row, column and class in the image before it was moved, read from the colours under the points."""
    rows, columns, _ = sample.points.T
    return sample.image[:, rows, columns].T * 255


def check_exact(moved: Sample, original: Sample) -> None:
    """Nothing was resized: colours are whole."""
    assert torch.equal(places(moved).round().long(), original.points)
    assert torch.equal(moved.points[:, 2], original.points[:, 2])
    assert torch.equal((moved.image[2] * 255).round().long(), moved.mask)
    assert torch.equal(moved.image, moved.guide)


def equal(one: Sample, other: Sample) -> bool:
    names = ("image", "mask", "points", "tags", "guide")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestFlip:
    @few
    @given(sides, sides, st.booleans(), st.booleans())
    def test_everything_moves_together_and_back(self, coded, height, width, horizontal, vertical):
        sample = make(coded, height, width)
        moved = flip(sample, horizontal=horizontal, vertical=vertical)
        check_exact(moved, sample)
        assert equal(flip(moved, horizontal=horizontal, vertical=vertical), sample)

    def test_horizontal_is_left_to_right(self, coded):
        sample = make(coded, 3, 5)
        assert torch.equal(flip(sample, horizontal=True, vertical=False).image[:, :, 0], sample.image[:, :, -1])
        assert torch.equal(flip(sample, horizontal=False, vertical=True).image[:, 0], sample.image[:, -1])


class TestRotate:
    @few
    @given(sides, sides, st.integers(-5, 9))
    def test_everything_moves_together(self, coded, height, width, turns):
        sample = make(coded, height, width)
        moved = rotate(sample, turns)
        check_exact(moved, sample)
        np.testing.assert_array_equal(moved.mask.numpy(), np.rot90(sample.mask.numpy(), turns))

    @few
    @given(sides, sides)
    def test_four_quarter_turns_are_none(self, coded, height, width):
        sample = make(coded, height, width)
        moved = sample
        for _ in range(4):
            moved = rotate(moved, 1)
        assert equal(moved, sample)
        assert equal(rotate(rotate(sample, 1), 3), sample)


@st.composite
def zooms(draw):
    height, width = draw(st.integers(2, 20)), draw(st.integers(2, 20))
    tall, wide = draw(st.integers(1, height)), draw(st.integers(1, width))
    return height, width, draw(st.integers(0, height - tall)), draw(st.integers(0, width - wide)), tall, wide


class TestZoom:
    @few
    @given(zooms(), st.sampled_from([1, 3, 5]))
    def test_odd_enlargement_keeps_the_colour_under_each_point(self, coded, case, factor):
        height, width, top, left, tall, wide = case
        sample = make(coded, height, width)
        moved = zoom(sample, top, left, tall, wide, (factor * tall, factor * wide))
        rows, columns = sample.points[:, 0], sample.points[:, 1]
        kept = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
        assert torch.equal(moved.points[:, 2], sample.points[kept, 2]), "points outside the window are dropped"
        torch.testing.assert_close(places(moved), sample.points[kept].float(), atol=1e-3, rtol=0)
        assert torch.equal(moved.image, moved.guide)
        window = sample.mask[top : top + tall, left : left + wide]
        assert torch.equal(moved.mask, window.repeat_interleave(factor, 0).repeat_interleave(factor, 1))

    @few
    @given(zooms(), st.integers(2, 40), st.integers(2, 40))  # to one column, torch resizes wrongly with antialiasing
    def test_any_size_keeps_points_on_their_tissue(self, coded, case, new_height, new_width):
        height, width, top, left, tall, wide = case
        sample = make(coded, height, width)
        moved = zoom(sample, top, left, tall, wide, (new_height, new_width))
        rows, columns = sample.points[:, 0], sample.points[:, 1]
        kept = (rows >= top) & (rows < top + tall) & (columns >= left) & (columns < left + wide)
        before = sample.points[kept]
        assert torch.equal(moved.points[:, 2], before[:, 2])
        assert ((moved.points[:, :2] >= 0) & (moved.points[:, :2] < torch.tensor([new_height, new_width]))).all()
        # half a pixel of the finer grid, and one of the coarser where shrinking blurs over the border
        room = torch.tensor([max(0.51, 1.01 * tall / new_height), max(0.51, 1.01 * wide / new_width)])
        assert ((places(moved)[:, :2] - before[:, :2]).abs() <= room).all()
        if new_height >= tall and new_width >= wide:
            assert torch.equal(moved.mask[moved.points[:, 0], moved.points[:, 1]], before[:, 2])

    def test_ignored_pixels_stay_ignored(self):
        mask = torch.tensor([[0, 255], [3, 255]])
        moved = zoom(Sample("s", torch.zeros(3, 2, 2), mask=mask), 0, 0, 2, 2, (5, 5))
        assert moved.mask.dtype == torch.int64
        assert set(moved.mask.unique().tolist()) == {0, 3, 255}

    def test_the_whole_at_its_own_size_is_unchanged(self, coded):
        sample = make(coded, 9, 7)
        assert equal(zoom(sample, 0, 0, 9, 7), sample)


class TestAugment:
    @few
    @given(st.integers(2, 14), st.integers(2, 14), st.integers(0, 10**6))
    def test_moves_keep_everything_aligned(self, coded, height, width, seed):
        sample = make(coded, height, width)
        moved = augment(sample, MOVES, seeded(seed))
        assert moved.image.shape == sample.image.shape, "only square samples are turned"
        check_exact(moved, sample)

    @few
    @given(st.integers(4, 24), st.integers(4, 24), st.integers(0, 10**6))
    def test_random_zoom_keeps_everything_aligned(self, coded, height, width, seed):
        sample = make(coded, height, width)
        moved = augment(sample, MOVES.model_copy(update={"scale": 0.4}), seeded(seed))
        assert moved.image.shape == sample.image.shape
        assert moved.mask.shape == sample.mask.shape
        # the crop is enlarged, so a point's pixel samples its own tissue
        assert torch.equal(moved.mask[moved.points[:, 0], moved.points[:, 1]], moved.points[:, 2])
        away = (places(moved)[:, None, :2] - sample.points[None, :, :2]).abs().amax(2)
        away = away.masked_fill(moved.points[:, None, 2] != sample.points[None, :, 2], torch.inf)
        assert (away.amin(1) <= 0.51).all(), "under each point lies the colour of a point of its class"
        # the nearest pixel before the move gives the mask, where it is not halfway between two
        spot = moved.image[:2] * 255
        clear = ((spot - spot.floor() - 0.5).abs() > 0.02).all(0)
        rows, columns = spot.round().long()
        assert torch.equal(moved.mask[clear], sample.mask[rows, columns][clear])

    @few
    @given(st.integers(0, 10**6))
    def test_colour_moves_alone_and_stays_in_range(self, coded, seed):
        sample = make(coded, 12, 12)
        strong = {"brightness": 0.9, "contrast": 0.9, "saturation": 0.9, "hue": 0.5, "blur": 1.0}
        coloured = augment(sample, MOVES.model_copy(update=strong), seeded(seed))
        plain = augment(sample, MOVES, seeded(seed))
        assert torch.equal(coloured.mask, plain.mask)
        assert torch.equal(coloured.points, plain.points)
        assert coloured.image.min() >= 0
        assert coloured.image.max() <= 1

    def test_every_move_is_drawn(self, coded):
        sample = make(coded, 8, 8)
        seen = {tuple(augment(sample, MOVES, seeded(seed)).mask.flatten().tolist()) for seed in range(200)}
        assert len(seen) == 8, "the eight symmetries of the square"

    def test_nothing_asked_nothing_done(self, coded):
        sample = make(coded, 8, 9)
        assert equal(augment(sample, STILL, seeded(0)), sample)

    @few
    @given(st.integers(0, 2**31), st.integers(0, 10**7))
    def test_a_draw_is_a_function_of_seed_and_number_alone(self, coded, seed, number):
        class Only:
            def __len__(self):
                return 1

            def sample(self, index, generator):
                return make(coded, 10, 10)

        config = Augmentation(scale=0.5, blur=0.5)
        one = Draws(Only(), config, seed)[0, number]
        state = torch.random.get_rng_state()
        torch.manual_seed(number)
        torch.rand(7)
        assert equal(one, Draws(Only(), config, seed)[0, number])
        torch.random.set_rng_state(state)
        assert not torch.equal(one.image, Draws(Only(), config, seed)[0, number + 1].image)
        assert not torch.equal(one.image, Draws(Only(), config, seed + 1)[0, number].image)

    @pytest.mark.parametrize("hint", ["mask", "points"])
    def test_hints_that_are_not_there_are_not_invented(self, hint):
        sample = Sample("s", torch.rand(3, 8, 8))
        for seed in range(8):
            assert getattr(augment(sample, Augmentation(scale=0.5), seeded(seed)), hint) is None
