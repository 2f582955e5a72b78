"""Where the cells of an encoder's maps look, and how to bring them to the middle of the pixels they stand for.

Cell i of a map of stride s stands for the pixels s i to s (i + 1), whose middle is s (i + 1/2): resizing maps to images
takes this for granted. A convolution of 3 x 3 with stride 2 and padding 1 looks at 2 i + 1/2 instead, half a pixel
before the middle of its two pixels, and every further one at half a cell of its own: at stride 16 a map lies 7.5 px too
far below and to the right, at stride 32 15.5 px (Araujo, Norris and Sim, *Computing Receptive Fields of Convolutional
Neural Networks*, Distill 2019). A decoder that is trained with masks learns this away; class maps cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tissuehint.nn.encoders import Encoder, probe_image

STEPS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def cell_centres(encoder: Encoder) -> tuple[float, ...]:
    """Middle of the receptive field of the first cell of each map, in px from the border of the image.

    Followed through the convolutions and poolings that make maps smaller, along columns; rows are taken to be alike.
    Where a map gets smaller in another way (the merging of patches, say), cells count as centred: stride / 2. Where two
    ways lead from a map to the next, that of the larger kernel counts, though shortcuts of a ResNet-D lie elsewhere.

    Args:
        encoder: any; its mode and torch's generators stay as they are.

    Example:
        >>> from tissuehint.nn.encoders import EncoderConfig, build_encoder
        >>> cell_centres(build_encoder(EncoderConfig(name="resnet10t")))
        (0.5, 0.5, 0.5, 0.5, 0.5)
    """
    image = probe_image(encoder)
    steps: dict[int, dict[int, nn.Module]] = {}  # by the sides of the maps before and after

    def follow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        before, after = inputs[0].shape[-1], output.shape[-1]
        if after < before:
            ways = steps.setdefault(before, {})
            # shortcuts and reduced keys of an attention have smaller kernels
            if after not in ways or _along(module, "kernel_size") > _along(ways[after], "kernel_size"):
                ways[after] = module

    hooks = [module.register_forward_hook(follow) for module in encoder.modules() if isinstance(module, STEPS)]
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            maps = encoder(image.to(next(encoder.parameters())))
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    side = image.shape[-1]
    centre, found, stride = 0.5, {side: 0.5}, 1.0
    while side in steps:
        after = max(steps[side])
        centre += stride * _first_centre(steps[side][after], side)
        stride *= side / after
        side, found[after] = after, centre
    return tuple(found.get(each.shape[-1], stride / 2) for each, stride in zip(maps, encoder.strides, strict=True))


def moved(maps: Tensor, cells: float) -> Tensor:
    """Maps (B,C,h,w) read at i + ``cells`` along rows and columns, linear between cells, the last one repeated.

    Example:
        >>> moved(torch.tensor([[[[0.0, 4.0, 8.0]]]]), 0.25).tolist()
        [[[[1.0, 5.0, 8.0]]]]
    """
    for axis in (-2, -1):
        places = (torch.arange(maps.shape[axis], device=maps.device) + cells).clamp(0, maps.shape[axis] - 1)
        first = places.floor().long()
        second = (first + 1).clamp_max(maps.shape[axis] - 1)
        part = (places - first).to(maps)
        part = part[:, None] if axis == -2 else part
        maps = torch.lerp(maps.index_select(axis, first), maps.index_select(axis, second), part)
    return maps


def _first_centre(step: nn.Module, before: int) -> float:
    """Middle of the first window of a step, in cells from the middle of the first cell of its input."""
    kernel, stride, padding = (_along(step, name) for name in ("kernel_size", "stride", "padding"))
    reach = (kernel - 1) * _along(step, "dilation")
    if "Same" in type(step).__name__:  # timm's form of TensorFlow's padding: what is needed, the smaller half before
        needed = (-(-before // stride) - 1) * stride + reach + 1 - before
        padding = max(needed, 0) // 2
    return reach / 2 - padding


def _along(step: nn.Module, name: str) -> int:
    value = getattr(step, name, 1)
    return int(value[-1] if isinstance(value, tuple) else value)
