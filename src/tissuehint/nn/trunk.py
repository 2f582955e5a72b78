"""The convolutional part of an encoder, cut at a stride, for images that are too large for a segmentation network.

Zhang, Burrows et al.: Point-supervised segmentation with contrast-based variational models. CVPR 2023, section 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig, TrunkConfig
from tissuehint.nn.encoders import cut, is_efficient, load_timm_weights, timm_pyramid
from tissuehint.nn.weights import LoadedWeights

__all__ = ["Trunk", "TrunkConfig"]


class Trunk(nn.Module):
    """The stages of a convolutional timm network up to one stride; the stages behind are not built.

    With ``checkpointing``, in training, only the inputs of the residual blocks (the stem and each further part that
    holds convolutions) are kept, and the gradient of a block is taken after a second pass through it. Batch norms
    that are not frozen update their running statistics in the first pass only.

    Args:
        config: network, weights, stride, checkpointing, batch norm. The normalisation is applied by the caller.

    Attributes:
        channels: of the map.
        stride: pixels of the image per cell.
        weights: what was read, or None for random weights.

    Raises:
        InputError: a network that is not a chain of convolutional stages, that has no map of this stride, and as
            ``build_encoder``.

    Example:
        >>> import torch
        >>> trunk = Trunk(TrunkConfig())
        >>> trunk(torch.rand(1, 3, 64, 96)).shape
        torch.Size([1, 256, 4, 6])
    """

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.config = config
        self.stride: int = config.stride
        self.backbone: Any = timm_pyramid(
            config.encoder, features_only=True, out_indices=(_index(config.encoder, config.stride),)
        )
        cut(self.backbone)
        information: Any = self.backbone.feature_info
        self.channels = int(information.channels()[-1])
        self.weights: LoadedWeights | None = load_timm_weights(self.backbone, config.encoder)
        self.train(self.training)

    def train(self, mode: bool = True) -> Trunk:
        """As ``nn.Module.train``, but frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.config.frozen_norm:
            for norm in _batch_norms(self):
                norm.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B,3,H,W), H and W multiples of the stride, to (B,channels,H/stride,W/stride)."""
        recompute = self.config.checkpointing and self.training and torch.is_grad_enabled()
        maps = images
        for segment in _segments(_chain(self.backbone)):
            if recompute:
                maps = checkpoint(segment, maps, use_reentrant=False, context_fn=partial(_contexts, segment))
            else:
                maps = segment(maps)
        return maps


def _index(encoder: EncoderConfig, stride: int) -> int:
    """Number of the last map of that stride, from a network without memory."""
    with torch.device("meta"):
        whole: Any = timm_pyramid(encoder.model_copy(update={"weights": "none"}), features_only=True)
    if not (_is_chain(whole) or is_efficient(whole)):
        rule = "is not a chain of convolutional stages that can be cut"
        raise InputError(
            f"trunk '{encoder.name}'", rule, "use resnet34 as in the paper, or another ResNet or MobileNet"
        )
    strides = whole.feature_info.reduction()
    found = [index for index, each in zip(whole.feature_info.out_indices, strides, strict=True) if each == stride]
    if not found:
        rule = f"has no map of stride {stride}, its maps have {', '.join(map(str, strides))}"
        raise InputError(f"trunk '{encoder.name}'", rule, "use one of these strides, or resnet34 as in the paper")
    return int(found[-1])


def _is_chain(backbone: nn.Module) -> bool:
    from timm.models import FeatureListNet

    return isinstance(backbone, FeatureListNet) and getattr(backbone, "output_fmt", None) != "NHWC"


def _chain(backbone: nn.Module) -> list[nn.Module]:
    """The parts in their order, sequences opened."""
    return [inner for part in backbone.children() for inner in (part if type(part) is nn.Sequential else [part])]


def _segments(chain: list[nn.Module]) -> list[nn.Sequential]:
    """Parts that are computed again as one: a block with what follows it until the next; the stem is the first.

    Single layers never begin a segment: one that works in place would spoil the input that is kept.
    """
    groups: list[list[nn.Module]] = [[]]
    for part in chain:
        is_block = not isinstance(part, nn.Conv2d) and any(isinstance(each, nn.Conv2d) for each in part.modules())
        if is_block and groups[-1]:
            groups.append([])
        groups[-1].append(part)
    return [nn.Sequential(*group) for group in groups]


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]


def _contexts(segment: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first pass and for the second."""
    return nullcontext(), _without_statistics(segment)


@contextmanager
def _without_statistics(segment: nn.Module) -> Iterator[None]:
    """Batch norms normalise as before and leave their running statistics alone."""
    norms = [norm for norm in _batch_norms(segment) if norm.training]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
