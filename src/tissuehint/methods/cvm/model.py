"""The network of CVM, and what two of the compared methods add to it."""

from __future__ import annotations

import copy
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.methods.cvm.comparators import AUXILIARY_DROPOUT
from tissuehint.methods.cvm.config import CVMConfig
from tissuehint.nn.networks import Dense, SegmentationNetwork, build_network


class CVMNetwork(nn.Module):
    """A segmentation network; for ``mean_teacher`` with a slow copy, for ``dual_branch`` with a second decoder.

    Only ``main`` predicts.

    Args:
        config: network, and which method of the comparison.
        num_tissue: C, number of tissue classes.

    Raises:
        InputError: ``dual_branch`` with a network that has no decoder of its own.
    """

    def __init__(self, config: CVMConfig, num_tissue: int) -> None:
        super().__init__()
        self.main: SegmentationNetwork = build_network(config.network, num_tissue)
        self.teacher: SegmentationNetwork | None = None
        self.auxiliary: nn.Module | None = None
        if config.complement == "mean_teacher":
            self.teacher = copy.deepcopy(self.main).requires_grad_(False)
        if config.complement == "dual_branch":
            self.auxiliary = _second_decoder(config, num_tissue)

    @property
    def encoder(self) -> nn.Module:
        """The part that pretrained weights are for."""
        return self.main.encoder

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,C,H,W) of images (B,3,H,W) in [0,1]."""
        logits: Tensor = self.main(images)
        return logits

    def dense(self, images: Tensor) -> Dense:
        """Features and logits on the working grid."""
        return self.main.dense(images)

    def both(self, images: Tensor) -> tuple[Dense, Tensor]:
        """Features and logits of the main decoder, and logits of the second one, all on the working grid."""
        assert self.auxiliary is not None
        levels: list[Any] = []
        inner: Any = self.main.network
        handle = inner.encoder.register_forward_hook(lambda module, words, output: levels.append(output))
        try:
            dense = self.main.dense(images)
        finally:
            handle.remove()
        height, width = dense.logits.shape[-2:]
        logits: Tensor = self.auxiliary(levels[0])
        return dense, logits[..., :height, :width]


class SecondDecoder(nn.Module):
    """A decoder and a head of their own on the features of the shared encoder, behind dropout."""

    def __init__(self, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = head

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Encoder features to logits."""
        # the first level is the image itself
        dropped = [levels[0]] + [F.dropout2d(level, AUXILIARY_DROPOUT, self.training) for level in levels[1:]]
        logits: Tensor = self.head(self.decoder(dropped))
        return logits


def _second_decoder(config: CVMConfig, num_tissue: int) -> SecondDecoder:
    """Built as a network of its own, so that its weights are drawn anew."""
    network: Any = build_network(config.network, num_tissue).network
    if config.network.architecture != "unet":
        rule = f"needs a second decoder at the resolution of the image, which {config.network.architecture} has not"
        raise InputError("method.complement dual_branch", rule, "use architecture: unet, as the paper")
    return SecondDecoder(network.decoder, network.segmentation_head)
