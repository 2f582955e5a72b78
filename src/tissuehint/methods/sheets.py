"""Sheets of thumbnails that methods leave for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def sheet(rows: Sequence[Sequence[NDArray[np.uint8]]], gap: int) -> NDArray[np.uint8]:
    """Square pictures (t,t,3) of one size, row by row on white; rows may differ in length."""
    side = rows[0][0].shape[0]
    step, columns = side + gap, max(len(row) for row in rows)
    found = np.full((len(rows) * step - gap, columns * step - gap, 3), 255, np.uint8)
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            found[top * step : top * step + side, left * step : left * step + side] = picture
    return found


def picture(values: Tensor) -> NDArray[np.uint8]:
    """(3,h,w) in [0,1] as (h,w,3) uint8."""
    return np.asarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def heat(values: Tensor, side: int) -> Tensor:
    """(3,side,side) from (h,w): black over red and yellow to white, its smallest value black and its largest white."""
    low, high = values.min(), values.max()
    scaled = ((values - low) / (high - low).clamp_min(1e-8))[None, None].float()
    grown = F.interpolate(scaled, (side, side), mode="bilinear", align_corners=False)[0, 0]
    return torch.stack([(3 * grown - step).clamp(0, 1) for step in range(3)])


def spread(number: int, most: int) -> list[int]:
    """At most ``most`` of 0..number-1, evenly spread."""
    return sorted({int(place) for place in np.linspace(0, number - 1, min(number, most)).round()}) if number else []
