"""Paired augmentation: image, mask, guide and points move together; colour moves alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Generator, Tensor

from tissuehint.data.samples import Sample


class Augmentation(BaseModel):
    """What is drawn at random for each training sample.

    Args:
        flip: horizontal and vertical flip, each with probability 1/2.
        rotate: a quarter turn count in 0..3, uniform (square samples only).
        brightness, contrast, saturation: factor drawn from [1-x, 1+x].
        hue: shift drawn from [-x, x] of the colour circle.
        blur: probability of a 3 x 3 Gaussian blur (sigma .8 px).
        scale: smallest linear zoom of a random crop that is resized back; 1 switches it off.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    flip: bool = True
    rotate: bool = True
    brightness: float = Field(default=0.2, ge=0, lt=1)
    contrast: float = Field(default=0.2, ge=0, lt=1)
    saturation: float = Field(default=0.2, ge=0, lt=1)
    hue: float = Field(default=0.03, ge=0, le=0.5)
    blur: float = Field(default=0.0, ge=0, le=1)
    scale: float = Field(default=1.0, gt=0, le=1)


def augment(sample: Sample, config: Augmentation, generator: Generator) -> Sample:
    """Draw one augmentation and apply it to image, mask, guide and points.

    Args:
        sample: (3,H,W) image in [0,1] with what goes with it.
        config: what may be drawn.
        generator: the only source of randomness, so that (seed, draw) gives the same sample on every machine.
    """
    if config.scale < 1:
        sample = zoom(sample, *_draw_zoom(sample, config.scale, generator))
    if config.flip:
        sample = flip(sample, horizontal=_coin(generator), vertical=_coin(generator))
    if config.rotate and sample.image.shape[1] == sample.image.shape[2]:
        sample = rotate(sample, int(torch.randint(4, (1,), generator=generator)))
    return replace(sample, image=_colour(sample.image, config, generator))


def flip(sample: Sample, *, horizontal: bool, vertical: bool) -> Sample:
    """Mirror left-right and (or) upside down."""
    height, width = sample.image.shape[1:]
    axes = [axis for axis, wanted in ((-1, horizontal), (-2, vertical)) if wanted]
    image, mask, points, guide = sample.image, sample.mask, sample.points, sample.guide
    if axes:
        image = image.flip(axes)
        mask = None if mask is None else mask.flip(axes)
        guide = None if guide is None else guide.flip(axes)
    if points is not None and axes:
        rows = height - 1 - points[:, 0] if vertical else points[:, 0]
        columns = width - 1 - points[:, 1] if horizontal else points[:, 1]
        points = torch.stack([rows, columns, points[:, 2]], 1)
    return replace(sample, image=image, mask=mask, points=points, guide=guide)


def rotate(sample: Sample, quarter_turns: int) -> Sample:
    """Turn counter-clockwise by 90 degrees, ``quarter_turns`` times."""
    image, mask, points, guide = sample.image, sample.mask, sample.points, sample.guide
    for _ in range(quarter_turns % 4):
        width = image.shape[2]
        image = torch.rot90(image, 1, (1, 2))
        mask = None if mask is None else torch.rot90(mask, 1, (0, 1))
        guide = None if guide is None else torch.rot90(guide, 1, (1, 2))
        if points is not None:
            points = torch.stack([width - 1 - points[:, 1], points[:, 0], points[:, 2]], 1)
    return replace(sample, image=image, mask=mask, points=points, guide=guide)


def zoom(sample: Sample, top: int, left: int, height: int, width: int, size: tuple[int, int] | None = None) -> Sample:
    """Cut a window and resize it: image and guide bilinear (antialiased when shrinking), nearest mask, points moved.

    Args:
        sample: what to cut from.
        top, left, height, width: the window in pixels.
        size: (height, width) of the result; None takes the size of the sample. Points move to their new pixel; those
            outside the window are dropped.
    """
    size = (sample.image.shape[1], sample.image.shape[2]) if size is None else size
    image = sample.image[None, :, top : top + height, left : left + width]
    image = torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)[0]
    mask, points = sample.mask, sample.points
    if mask is not None:
        window = mask[None, None, top : top + height, left : left + width].to(torch.uint8)
        mask = torch.nn.functional.interpolate(window, size, mode="nearest-exact")[0, 0].to(torch.int64)
    guide = sample.guide
    if guide is not None:
        guide = guide[None, :, top : top + height, left : left + width]
        guide = torch.nn.functional.interpolate(guide, size, mode="bilinear", align_corners=False, antialias=True)[0]
    if points is not None:
        moved = points[:, :2] - torch.tensor([top, left])
        window_size = torch.tensor([height, width])
        inside = (moved >= 0).all(1) & (moved < window_size).all(1)
        scaled = ((moved[inside] + 0.5) * torch.tensor(size) / window_size).floor().to(torch.int64)
        points = torch.cat([scaled, points[inside, 2:]], 1)
    return replace(sample, image=image, mask=mask, points=points, guide=guide)


def _draw_zoom(sample: Sample, smallest: float, generator: Generator) -> tuple[int, int, int, int]:
    height, width = sample.image.shape[1:]
    share = smallest + (1 - smallest) * float(torch.rand(1, generator=generator))
    tall, wide = max(1, round(height * share)), max(1, round(width * share))
    top = int(torch.randint(height - tall + 1, (1,), generator=generator))
    left = int(torch.randint(width - wide + 1, (1,), generator=generator))
    return top, left, tall, wide


def _colour(image: Tensor, config: Augmentation, generator: Generator) -> Tensor:
    from torchvision.transforms.v2 import functional as colour

    def factor(spread: float) -> float:
        return 1 + spread * (2 * float(torch.rand(1, generator=generator)) - 1)

    if config.brightness:
        image = colour.adjust_brightness(image, factor(config.brightness))
    if config.contrast:
        image = colour.adjust_contrast(image, factor(config.contrast))
    if config.saturation:
        image = colour.adjust_saturation(image, factor(config.saturation))
    if config.hue:
        image = colour.adjust_hue(image, factor(config.hue) - 1)
    if config.blur and float(torch.rand(1, generator=generator)) < config.blur:
        image = colour.gaussian_blur(image, [3, 3], [0.8, 0.8])
    return image.clamp(0, 1)


def _coin(generator: Generator) -> bool:
    return bool(torch.rand(1, generator=generator) < 0.5)
