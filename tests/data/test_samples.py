import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.data.samples import Batch, Sample, collate, crop
from tissuehint.data.training_sets import to_tensor
from tissuehint.errors import InputError

few = settings(max_examples=30)


def make(coded, height, width, seed=0):
    """A sample in which every pixel is a point."""
    image, mask = coded(height, width, seed)
    rows, columns = np.indices(mask.shape)
    points = np.stack([rows, columns, mask.astype(np.int64)], 2).reshape(-1, 3)
    return Sample("s", to_tensor(image), None, torch.from_numpy(points), None, torch.from_numpy(mask).long())


class TestCrop:
    @few
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30), st.integers(1, 30), st.data())
    def test_image_mask_and_points_move_together(self, coded, height, width, tall, wide, data):
        sample = make(coded, height, width)
        top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
        window = crop(sample, top, left, tall, wide)
        inside_tall, inside_wide = min(tall, height - top), min(wide, width - left)
        assert window.image.shape == (3, tall, wide)
        # every pixel of the image that lies in the window is a point of it, under its own colour
        assert len(window.points) == inside_tall * inside_wide
        rows, columns, labels = window.points.T
        colours = (window.image[:, rows, columns] * 255).round().long()
        assert torch.equal(colours, torch.stack([rows + top, columns + left, labels]))
        assert torch.equal(window.mask[rows, columns], labels)

    @few
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 25), st.integers(0, 25))
    def test_over_the_border_the_image_is_mirrored_and_the_mask_ignored(self, coded, height, width, below, right):
        sample = make(coded, height, width)
        window = crop(sample, 0, 0, height + below, width + right)
        mirrored = np.pad(sample.image.numpy(), ((0, 0), (0, below), (0, right)), mode="reflect")
        np.testing.assert_array_equal(window.image.numpy(), mirrored)
        outside = torch.ones(height + below, width + right, dtype=torch.bool)
        outside[:height, :width] = False
        assert (window.mask[outside] == 255).all()
        assert torch.equal(window.mask[:height, :width], sample.mask)

    def test_hints_of_the_whole_stay(self):
        sample = Sample("s", torch.zeros(3, 4, 4), torch.tensor([1.0, 0]), None, torch.tensor([0.5, 0.5]))
        window = crop(sample, 1, 1, 2, 2)
        assert window.tags is sample.tags
        assert window.proportions is sample.proportions
        assert window.points is None
        assert window.mask is None


class TestCollate:
    def test_samples_are_stacked_in_order(self, coded):
        samples = [make(coded, 5, 6, seed) for seed in range(3)]
        batch = collate(samples)
        assert len(batch) == 3
        assert torch.equal(batch.images[2], samples[2].image)
        assert torch.equal(batch.masks[1], samples[1].mask)
        assert torch.equal(batch.points[1], samples[1].points)

    @pytest.mark.parametrize("hint", ["tags", "points", "proportions", "mask"])
    def test_a_hint_that_one_sample_lacks_is_none(self, hint):
        full = {"tags": torch.ones(2), "points": torch.zeros(0, 3).long(), "proportions": torch.tensor([1.0, 0])}
        full["mask"] = torch.zeros(4, 4).long()
        whole = Sample("a", torch.zeros(3, 4, 4), **full)
        batch = collate([whole, Sample("b", torch.zeros(3, 4, 4), **{**full, hint: None})])
        names = {"tags": "tags", "points": "points", "proportions": "proportions", "mask": "masks"}
        for name, field in names.items():
            assert (getattr(batch, field) is None) == (name == hint)

    def test_smaller_images_are_mirrored_up_to_the_largest_and_not_labelled_there(self, coded):
        samples = [make(coded, 5, 8), make(coded, 7, 3)]
        batch = collate(samples)
        for index, sample in enumerate(samples):
            grown = crop(sample, 0, 0, 7, 8)
            assert torch.equal(batch.images[index], grown.image)
            assert torch.equal(batch.masks[index], grown.mask)
            assert torch.equal(batch.points[index], sample.points)

    def test_an_empty_tag_row_is_not_a_missing_one(self):
        assert collate([Sample("a", torch.zeros(3, 4, 4), torch.zeros(2))]).need_tags().tolist() == [[0, 0]]


def test_a_batch_moves_with_everything_in_it(coded):
    batch = collate([make(coded, 4, 4)]).to("meta")
    assert {batch.images.device.type, batch.masks.device.type, batch.points[0].device.type} == {"meta"}
    assert batch.tags is None


def test_tags_that_are_needed_and_missing_are_an_input_error():
    with pytest.raises(InputError, match=r"case_7.*no tags"):
        Batch(["case_7"], torch.zeros(1, 3, 4, 4)).need_tags()
