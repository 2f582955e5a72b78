r"""Test-time augmentation: an image turned, mirrored and shifted, and what is said of it brought back into its frame.

A view looks at the image through a canvas, with the rotation R, the mirroring F and the shift d: what stands at p on
the canvas is the image at F R (p - d) around the centres of both. What lies outside the image is white, never black.
All in continuous pixels, one resampling each way; a pixel that a view does not see (a corner that turned out of the
canvas) has validity 0 there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor


class View(NamedTuple):
    """One way to look at an image.

    Args:
        rotation: degrees, counter-clockwise.
        mirrored: left-right, before the rotation.
        offset: (rows, columns) in px, by which the image is moved on the canvas, and its grid of cells with it.
    """

    rotation: float = 0.0
    mirrored: bool = False
    offset: tuple[int, int] = (0, 0)


class ViewConfig(BaseModel):
    """Views whose probabilities are fused: the product of the three lists.

    Args:
        rotations: degrees; multiples of 90 lose nothing, others lose the corners (PropSegNet: 0, 30, ..., 150).
        mirror: add every view mirrored.
        offsets: shifts of the grid of cells in px, along rows and columns each (PropSegNet: 0, 50, 100 for tiles of
            150 px).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rotations: tuple[float, ...] = (0, 30, 60, 90, 120, 150)
    mirror: bool = True
    offsets: tuple[int, ...] = (0,)

    @field_validator("rotations", "offsets")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("names no view; write [0] for the plain image")
        return value

    def views(self) -> list[View]:
        """All views, the plain one first where the lists begin with 0."""
        return [
            View(rotation, mirrored, (down, right))
            for mirrored in ((False, True) if self.mirror else (False,))
            for down in self.offsets
            for right in self.offsets
            for rotation in self.rotations
        ]


class Seen(NamedTuple):
    """What the views say of the pixels of a working grid.

    Args:
        probabilities: p_t (B,N,C,h,w), in the simplex at every pixel.
        validity: m_t (B,N,h,w), 1 where the view sees the pixel, else 0; at least one view sees every pixel where the
            list has the plain view.
    """

    probabilities: Tensor
    validity: Tensor


def canvas_size(view: View, height: int, width: int) -> tuple[int, int]:
    """Size of the canvas: that of the image, on its side for rotations nearer to 90 than to 0 or 180 degrees."""
    turns = round(view.rotation / 90) % 2
    return (width, height) if turns else (height, width)


def look(images: Tensor, view: View) -> Tensor:
    """Images (B,C,H,W) in [0,1] as the view shows them, white (1) where they end: (B,C,h,w) of the canvas."""
    height, width = images.shape[-2:]
    if view == View():
        return images
    canvas = canvas_size(view, height, width)
    grid = _sampling(view, canvas, canvas, (height, width), images)
    # a dark image on zeros is a white one on ones
    dark = F.grid_sample(1 - images, grid.expand(len(images), -1, -1, -1), mode="bilinear", align_corners=False)
    return 1 - dark


def bring_back(
    maps: Tensor, view: View, image: tuple[int, int], covered: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What is said of the cells of a canvas, on the working grid of the image.

    Args:
        maps: (B,C,n,m) on the cells of the canvas; between the centres of cells it is interpolated.
        view: through which the canvas was seen.
        image: (H,W) of the image in px.
        covered: px (rows, columns) of the canvas that the cells cover together, at least its size.
        size: (h,w) of the working grid.

    Returns:
        (B,C,h,w), and the validity (h,w).
    """
    height, width = image
    canvas = canvas_size(view, height, width)
    grid = _back(view, size, image, canvas, maps)
    inside = (grid.abs() <= 1 + 1e-6).all(-1)[0].to(maps)
    # the cells may reach over the lower and right border of the canvas
    stretch = grid.new_tensor([canvas[1] / covered[1], canvas[0] / covered[0]])
    grid = (grid + 1) * stretch - 1
    moved = F.grid_sample(
        maps, grid.expand(len(maps), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved, inside


def _matrix(view: View) -> Tensor:
    """F R: from canvas to image, both from their centres in px, as (x, y)."""
    angle = math.radians(view.rotation)
    # exact for quarter turns, so that they move pixels onto pixels
    cos, sin = (round(part(angle), 12) for part in (math.cos, math.sin))
    mirror = -1.0 if view.mirrored else 1.0
    return torch.tensor([[mirror * cos, -mirror * sin], [sin, cos]], dtype=torch.float64)


def _sampling(
    view: View, size: tuple[int, int], canvas: tuple[int, int], image: tuple[int, int], like: Tensor
) -> Tensor:
    """Where on the image (in [-1,1]) the pixels of a canvas of ``size`` cells look: (1,h,w,2)."""
    points = _centres(size, canvas) - torch.tensor([view.offset[1], view.offset[0]], dtype=torch.float64)
    seen = points @ _matrix(view).T
    return (seen / torch.tensor([image[1] / 2, image[0] / 2], dtype=torch.float64))[None].to(like)


def _back(view: View, size: tuple[int, int], image: tuple[int, int], canvas: tuple[int, int], like: Tensor) -> Tensor:
    """Where on the canvas (in [-1,1]) the cells of the image's working grid stand: (1,h,w,2)."""
    # the matrix is orthogonal, so that its transpose is its inverse
    points = _centres(size, image) @ _matrix(view)
    points = points + torch.tensor([view.offset[1], view.offset[0]], dtype=torch.float64)
    return (points / torch.tensor([canvas[1] / 2, canvas[0] / 2], dtype=torch.float64))[None].to(like)


def _centres(size: tuple[int, int], extent: tuple[int, int]) -> Tensor:
    """(h,w,2) of (x, y) in px from the centre of a rectangle of ``extent`` px that is cut into ``size`` cells."""
    rows, columns = (
        (torch.arange(cells, dtype=torch.float64) + 0.5) * (length / cells) - length / 2
        for cells, length in zip(size, extent, strict=True)
    )
    down, right = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([right, down], -1)
