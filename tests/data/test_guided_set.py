"""Items with the soft target that a method made for them, and what augmentation does to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from tissuehint.data.patches import PatchGrid
from tissuehint.data.records import Record
from tissuehint.data.samples import collate, crop
from tissuehint.data.training_sets import Draws, GuidedSet, HintSet, build_hint_set
from tissuehint.data.transforms import Augmentation
from tissuehint.labels import LabelSpace, Points

LABELS = LabelSpace(("gland", "stroma"))
SHAPES_ONLY = Augmentation(flip=True, rotate=True, brightness=0, contrast=0, saturation=0, hue=0)


def records(*sizes: tuple[int, int]) -> list[Record]:
    found = []
    for number, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)
        found.append(Record(f"image_{number}", pixels, points=Points([[3, 5, 0], [height - 1, 0, 1]])))
    return found


def items(*sizes: tuple[int, int], grid: PatchGrid | None = None) -> HintSet:
    return build_hint_set(records(*sizes), LABELS, grid, Record.read_image, supervision="points")


def red_channel(hints: HintSet) -> dict[str, Tensor]:
    """Guides that show where they belong: the red of the image and what is left of 1."""
    samples = (hints.sample(index) for index in range(len(hints)))
    return {sample.id: torch.stack([sample.image[0], 1 - sample.image[0]]) for sample in samples}


def test_item_and_guide_belong_together() -> None:
    hints = items((40, 48), (36, 32))
    guides = red_channel(hints)
    guided = GuidedSet(hints, guides.get, 2)
    assert len(guided) == 2
    for index in range(2):
        sample, plain = guided.sample(index), hints.sample(index)
        assert sample.id == plain.id
        assert torch.equal(sample.image, plain.image)
        assert torch.equal(sample.points, plain.points)
        assert torch.equal(sample.guide, guides[plain.id])


def test_without_a_guide_it_is_zero_everywhere() -> None:
    sample = GuidedSet(items((40, 48)), lambda name: None, 3).sample(0)
    assert torch.equal(sample.guide, torch.zeros(3, 40, 48))


def test_what_reaches_over_the_border_is_cut_off() -> None:
    guide = torch.rand(2, 44, 50)
    sample = GuidedSet(items((41, 48)), lambda name: guide, 2).sample(0)
    assert torch.equal(sample.guide, guide[:, :41, :48])


def test_guides_are_asked_for_at_each_draw() -> None:
    """Loading processes live as long as the training; what a method publishes must reach them."""
    found: dict[str, Tensor] = {}
    guided = GuidedSet(items((40, 40)), found.get, 2)
    assert not guided.sample(0).guide.any()
    found["image_0"] = torch.ones(2, 40, 40)
    assert guided.sample(0).guide.all()


@pytest.mark.parametrize("size", [(40, 40), (40, 48)])
def test_augmentation_moves_image_guide_and_points_together(size: tuple[int, int]) -> None:
    hints = items(size)
    draws = Draws(GuidedSet(hints, red_channel(hints).get, 2), SHAPES_ONLY, seed=0)
    plain, seen = hints.sample(0), set()
    for number in range(24):
        sample = draws[0, number]
        assert torch.equal(sample.guide[0], sample.image[0])
        for moved, point in zip(sample.points, plain.points, strict=True):
            assert torch.equal(sample.image[:, moved[0], moved[1]], plain.image[:, point[0], point[1]])
        seen.add(sample.image.numpy().tobytes())
    assert len(seen) == (8 if size[0] == size[1] else 4)


def test_zoom_keeps_the_guide_on_its_image() -> None:
    hints = items((40, 40))
    draws = Draws(GuidedSet(hints, red_channel(hints).get, 2), SHAPES_ONLY.model_copy(update={"scale": 0.5}), seed=0)
    for number in range(6):
        sample = draws[0, number]
        torch.testing.assert_close(sample.guide[0], sample.image[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(sample.guide.sum(0), torch.ones(40, 40), rtol=0, atol=1e-5)


def test_patches_have_guides_of_their_own() -> None:
    hints = items((64, 96), grid=PatchGrid(side=32, stride=32))
    guides = red_channel(hints)
    assert len(guides) == len(hints) == 6
    guided = GuidedSet(hints, guides.get, 2)
    for index in range(6):
        sample = guided.sample(index, Generator())
        assert torch.equal(sample.guide[0], sample.image[0])


def test_a_batch_of_several_sizes_says_nothing_beside_an_image() -> None:
    hints = items((40, 48), (44, 32))
    guided = GuidedSet(hints, lambda name: torch.full((2, 64, 64), 0.5), 2)
    batch = collate([guided.sample(0), guided.sample(1)])
    assert batch.guides is not None
    assert batch.guides.shape == (2, 2, 44, 48)
    said = batch.guides.sum(1)
    assert torch.equal(said[0] == 1, torch.arange(44)[:, None].expand(44, 48) < 40)
    assert torch.equal(said[1] == 1, torch.arange(48)[None].expand(44, 48) < 32)
    assert torch.equal(batch.to("cpu").guides, batch.guides)


def test_a_batch_with_one_unguided_sample_has_no_guides() -> None:
    hints = items((40, 40), (40, 40))
    guided = GuidedSet(hints, lambda name: torch.zeros(2, 40, 40), 2)
    assert collate([guided.sample(0), hints.sample(1)]).guides is None


def test_a_window_cuts_the_guide_too() -> None:
    hints = items((40, 40))
    sample = crop(GuidedSet(hints, red_channel(hints).get, 2).sample(0), 30, 8, 16, 16)
    assert torch.equal(sample.guide[0, :10], sample.image[0, :10])
    assert not sample.guide[:, 10:].any()
