"""What a network is fed: one sample, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.labels import IGNORE


@dataclass(frozen=True)
class Sample:
    """One image and the hints that exist for it.

    Args:
        id: name of the image (for patches: name of the image, row and column of the upper left corner).
        image: (3,H,W) float in [0,1].
        tags: (C,) float of 0 and 1 over tissue classes, or None.
        points: (P,3) int64 rows of (row, column, class), or None.
        proportions: (C,) float summing to 1, or None.
        mask: (H,W) int64 class indices, 255 = ignore: a pseudo mask in stage 2, the truth only where the recipe says
            ``labels: masks``; otherwise None.
        guide: (C,H,W) float soft target that a method made for this very item while it trains, summing to 1 over the
            classes, or 0 in all of them where it says nothing; or None.
    """

    id: str
    image: Tensor
    tags: Tensor | None = None
    points: Tensor | None = None
    proportions: Tensor | None = None
    mask: Tensor | None = None
    guide: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Samples, stacked.

    Args:
        ids: B names.
        images: (B,3,H,W) float in [0,1].
        tags: (B,C) or None.
        points: B tensors (P_b,3), or None.
        proportions: (B,C) or None.
        masks: (B,H,W) int64 or None.
        guides: (B,C,H,W) float or None.
    """

    ids: list[str]
    images: Tensor
    tags: Tensor | None = None
    points: list[Tensor] | None = None
    proportions: Tensor | None = None
    masks: Tensor | None = None
    guides: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU do not wait; the loader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            self.ids,
            change(self.images),
            None if self.tags is None else change(self.tags),
            None if self.points is None else [change(points) for points in self.points],
            None if self.proportions is None else change(self.proportions),
            None if self.masks is None else change(self.masks),
            None if self.guides is None else change(self.guides),
        )

    def need_tags(self) -> Tensor:
        """(B,C) tags.

        Raises:
            InputError: the batch has none.
        """
        if self.tags is None:
            raise InputError(f"images {', '.join(self.ids[:3])}", "have no tags", "give tags, or use another method")
        return self.tags

    def need_points(self) -> list[Tensor]:
        """B tensors (P_b,3).

        Raises:
            InputError: the batch has none.
        """
        if self.points is None:
            raise InputError(
                f"images {', '.join(self.ids[:3])}", "have no points", "give points, or use another method"
            )
        return self.points

    def need_proportions(self) -> Tensor:
        """(B,C) proportions.

        Raises:
            InputError: the batch has none.
        """
        if self.proportions is None:
            subject = f"images {', '.join(self.ids[:3])}"
            raise InputError(subject, "have no proportions", "give proportions, or use another method")
        return self.proportions


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; a hint that any sample lacks is None in the batch.

    Images of different sizes are mirrored at the lower and right border up to the largest (``crop``), which shows no
    tissue that the image does not have: tags stay right.
    """
    height, width = (max(sample.image.shape[axis] for sample in samples) for axis in (1, 2))
    samples = [
        sample if sample.image.shape[1:] == (height, width) else crop(sample, 0, 0, height, width) for sample in samples
    ]
    return Batch(
        [sample.id for sample in samples],
        torch.stack([sample.image for sample in samples]),
        _stack([sample.tags for sample in samples]),
        _together([sample.points for sample in samples]),
        _stack([sample.proportions for sample in samples]),
        _stack([sample.mask for sample in samples]),
        _stack([sample.guide for sample in samples]),
    )


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Cut a window, keeping mask, guide and points aligned.

    Where the window reaches over the lower or right border, the image is mirrored, the mask is 255 (ignore), the guide
    is 0. Points
    outside the window are dropped; tags and proportions stay those of the whole sample.

    Args:
        sample: what to cut from.
        top, left: upper left corner in pixels, inside the image.
        height, width: size of the window in pixels.
    """
    image = _mirror(sample.image[:, top : top + height, left : left + width], height, width)
    mask = sample.mask
    if mask is not None:
        mask = mask[top : top + height, left : left + width]
        lacking = (0, width - mask.shape[1], 0, height - mask.shape[0])
        mask = torch.nn.functional.pad(mask, lacking, value=IGNORE)
    guide = sample.guide
    if guide is not None:
        guide = guide[:, top : top + height, left : left + width]
        guide = torch.nn.functional.pad(guide, (0, width - guide.shape[2], 0, height - guide.shape[1]))
    points = sample.points
    if points is not None:
        points = points - torch.tensor([top, left, 0])
        inside = (points[:, :2] >= 0).all(1) & (points[:, 0] < height) & (points[:, 1] < width)
        points = points[inside]
    return replace(sample, image=image, mask=mask, points=points, guide=guide)


def _mirror(image: Tensor, height: int, width: int) -> Tensor:
    """Grow (3,h,w) to (3,height,width) by mirroring at the lower and right border, repeatedly where needed."""
    rows = _mirrored_indices(image.shape[1], height)
    columns = _mirrored_indices(image.shape[2], width)
    if len(rows) == image.shape[1] and len(columns) == image.shape[2]:
        return image
    return image[:, rows][:, :, columns]


def _mirrored_indices(size: int, wanted: int) -> Tensor:
    """0 1 2 1 0 1 2 ...: the first ``wanted`` terms for ``size`` pixels."""
    if wanted <= size:
        return torch.arange(wanted)
    period = max(2 * size - 2, 1)
    index = torch.arange(wanted) % period
    return torch.where(index < size, index, period - index)


def _stack(values: list[Tensor | None]) -> Tensor | None:
    present = [value for value in values if value is not None]
    return torch.stack(present) if present and len(present) == len(values) else None


def _together(values: list[Tensor | None]) -> list[Tensor] | None:
    present = [value for value in values if value is not None]
    return present if present and len(present) == len(values) else None
