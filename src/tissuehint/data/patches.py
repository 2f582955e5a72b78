"""Sliding patches: where they lie, what they are called, how their maps go back into the image.

The one place that knows windows; training patches, sliding inference and pseudo masks all ask here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from tissuehint.data.samples import Sample, crop
from tissuehint.ops.white import white_mask


class PatchGrid(BaseModel):
    """Square windows over an image.

    Args:
        side: side of a window in pixels of the image.
        stride: step between windows; windows overlap where it is smaller than ``side``.
        resize: side in pixels at which the network sees the window; None keeps ``side``.
        presence: a class is tagged in a patch if it covers more than this fraction of its labelled pixels (OEEM: .05).
        max_white: drop a training patch if more than this fraction is white; None keeps all.
        white_threshold: grey value in 0..255 above which a pixel counts as white.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    side: int = Field(default=224, ge=16)
    stride: int = Field(default=224, ge=1)
    resize: int | None = Field(default=None, ge=16)
    presence: float = Field(default=0.05, ge=0, lt=1)
    max_white: float | None = Field(default=None, gt=0, le=1)
    white_threshold: int = Field(default=200, ge=0, le=255)

    @model_validator(mode="after")
    def _no_gaps(self) -> PatchGrid:
        if self.stride > self.side:
            raise ValueError(f"stride {self.stride} is larger than side {self.side}: pixels between windows are lost")
        return self

    @property
    def network_side(self) -> int:
        """Side in pixels of what the network sees."""
        return self.resize or self.side


def windows(height: int, width: int, side: int, stride: int) -> NDArray[np.int64]:
    """Upper left corners (N,2) of windows that cover every pixel of an image.

    Steps of ``stride`` from the upper left; the last row and column lie flush with the border. An image smaller than
    ``side`` gets one window at 0, which reaches over the border.

    Example:
        >>> windows(100, 250, 100, 100).tolist()
        [[0, 0], [0, 100], [0, 150]]
    """
    rows, columns = _starts(height, side, stride), _starts(width, side, stride)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def _starts(length: int, side: int, stride: int) -> NDArray[np.int64]:
    last = max(length - side, 0)
    starts = np.arange(0, last + 1, stride, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)


def presence_tags(
    mask: NDArray[np.uint8], corners: NDArray[np.int64], grid: PatchGrid, num_tissue: int, ignore: int
) -> NDArray[np.uint8]:
    """Tags (N,C) uint8 of the windows of an image, from its mask.

    A class is present if it covers more than ``grid.presence`` of the labelled (not ignored) pixels of the window.

    Args:
        mask: (H,W) class indices.
        corners: (N,2) from ``windows``.
        grid: side and threshold.
        num_tissue: C; white is never tagged.
        ignore: mask value that is not counted.
    """
    labelled = _window_sums(mask != ignore, corners, grid.side)
    covered = np.stack([_window_sums(mask == label, corners, grid.side) for label in range(num_tissue)], 1)
    # a quotient, not covered > presence * labelled: 0.29 * 100 is below 29 in floating point
    return (covered / np.maximum(labelled, 1)[:, None] > grid.presence).astype(np.uint8)


def proportion_rows(
    mask: NDArray[np.uint8], corners: NDArray[np.int64], grid: PatchGrid, num_tissue: int
) -> NDArray[np.float64]:
    """Tissue proportions (N,C) of windows, from the mask of the image; each row sums to 1, NaN without tissue."""
    covered = np.stack([_window_sums(mask == label, corners, grid.side) for label in range(num_tissue)], 1)
    total = covered.sum(1, keepdims=True)
    return np.where(total > 0, covered / np.maximum(total, 1), np.nan)


def white_fractions(image: NDArray[np.uint8], corners: NDArray[np.int64], grid: PatchGrid) -> NDArray[np.float64]:
    """Share (N,) of each window that is brighter than ``grid.white_threshold`` in grey."""
    bright = white_mask(image, grid.white_threshold / 255, min_area=0)
    area = _window_sums(np.ones(bright.shape, bool), corners, grid.side)
    return np.asarray(_window_sums(bright, corners, grid.side) / area)


def _window_sums(field: NDArray[np.bool_], corners: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Number of true pixels in each window, through one integral image."""
    total = np.zeros((field.shape[0] + 1, field.shape[1] + 1), np.int64)
    total[1:, 1:] = field.cumsum(0, dtype=np.int64).cumsum(1)
    top, left = corners[:, 0], corners[:, 1]
    bottom, right = np.minimum(top + side, field.shape[0]), np.minimum(left + side, field.shape[1])
    return np.asarray(total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left])


def resize_image(images: Tensor, side: int) -> Tensor:
    """(B,3,h,w) to (B,3,side,side), bilinear with antialiasing when shrinking."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)


def sliding_map(
    mapper: Callable[[Tensor, list[tuple[int, int]]], Tensor], image: Tensor, grid: PatchGrid | None, *, batch_size: int
) -> Tensor:
    """Tissue map (K,H,W) of an image of any size: mean over the windows that see a pixel.

    Args:
        mapper: from windows (B,3,s,s), and their B corners (top, left), to tissue maps (B,K,s,s); s is
            ``grid.network_side``, or the image's own size without a grid.
        image: (3,H,W) float in [0,1].
        grid: windows; None gives the whole image to ``mapper`` at once.
        batch_size: windows at a time.

    Returns:
        (K,H,W) float32 on the device of what ``mapper`` returns.
    """
    height, width = image.shape[1:]
    if grid is None:
        return mapper(image[None], [(0, 0)])[0].float()
    corners = windows(height, width, grid.side, grid.stride)
    whole = Sample("", image)
    total: Tensor | None = None
    for start in range(0, len(corners), batch_size):
        some = [(int(top), int(left)) for top, left in corners[start : start + batch_size]]
        patches = torch.stack([crop(whole, top, left, grid.side, grid.side).image for top, left in some])
        maps = mapper(resize_image(patches, grid.network_side), some).float()
        if maps.shape[-1] != grid.side:
            maps = F.interpolate(maps, (grid.side, grid.side), mode="bilinear", align_corners=False)
        if total is None:
            total = maps.new_zeros(maps.shape[1], height, width)
            seen = maps.new_zeros(height, width)
        for (top, left), part in zip(some, maps, strict=True):
            bottom, right = min(top + grid.side, height), min(left + grid.side, width)
            total[:, top:bottom, left:right] += part[:, : bottom - top, : right - left]
            seen[top:bottom, left:right] += 1
    assert total is not None
    return total / seen
