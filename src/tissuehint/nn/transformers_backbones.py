"""Backbones of the transformers library as feature pyramids, from architectures that are built in (no network needed).

The code is the Apache-2.0 one of transformers. NVIDIA's own SegFormer code (non-commercial licence) is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.weights import LoadedWeights, best_prefix, canonical, load_backbone, read_tensors

# Xie et al. 2021 (SegFormer), appendix: channels and depths of MiT-B0 to B5
MIT = {
    "mit_b0": ((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": ((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": ((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": ((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": ((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": ((64, 128, 320, 512), (3, 6, 40, 3)),
}
MIT_STRIDES = {None: (4, 2, 2, 2), 16: (4, 2, 2, 1), 8: (4, 2, 1, 1)}
# Liu et al. 2021 (Swin), section 3.3, and heads of 32 channels: first channels, depths, heads
SWIN = {
    "swin_tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "swin_small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "swin_base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
# Oquab et al. 2023 (DINOv2), appendix: channels, blocks, heads; patches of 14 px
DINOV2 = {"dinov2_small": (384, 12, 6), "dinov2_base": (768, 12, 12), "dinov2_large": (1024, 24, 16)}
DINOV2_PATCH = 14

HUB = {
    **{name: f"nvidia/{name.replace('_', '-')}" for name in MIT},
    **{name: f"microsoft/{name.replace('_', '-')}-patch4-window7-224" for name in SWIN},
    **{name: f"facebook/{name.replace('_', '-')}" for name in DINOV2},
}
# norms that segmentation adds to Swin's stages; published classifiers have none, they start as the identity
ADDED_NORMS = "hidden_states_norms"


class TransformersPyramid(nn.Module):
    """A transformers backbone that returns its stages as maps.

    Args:
        name: ``mit_b0`` ... ``mit_b5``, ``swin_tiny|small|base``, ``dinov2_small|base|large``.
        output_stride: 8 or 16 for ``mit_*`` only; None as published.

    Attributes:
        channels: per map, fine to coarse.
        strides: per map, pixels of the image per cell.
    """

    def __init__(self, name: str, output_stride: int | None = None) -> None:
        super().__init__()
        self.backbone: Any
        if name not in HUB:
            raise InputError(f"encoder 'hf:{name}'", f"is not one of {', '.join(HUB)}", "use one of these after hf:")
        if output_stride is not None and name not in MIT:
            rule = f"has no dilated form of output stride {output_stride}"
            raise InputError(f"encoder 'hf:{name}'", rule, "leave output_stride out, or use hf:mit_*")
        self.name = name
        self.backbone, self.channels, self.strides = _build(name, output_stride)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B,3,H,W), H and W multiples of the largest stride, to maps (B,C,H/stride,W/stride), fine to coarse."""
        if self.name in MIT:
            return list(self.backbone(images, output_hidden_states=True).hidden_states)
        return list(self.backbone(images).feature_maps)

    def load(self, path: Path) -> LoadedWeights:
        """Read weights of the layout that this library or transformers (old or new) writes.

        Raises:
            InputError: unreadable file, or weights of another architecture.
        """
        tensors = read_tensors(path)
        own = {canonical(name): name for name in self.backbone.state_dict()}
        required = {name for name in own if not name.startswith(ADDED_NORMS)}
        if required <= best_prefix(tensors, own).keys():
            return load_backbone(self.backbone, path)
        bare = {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in tensors.items()}
        return self._convert(str(path), None, state_dict=bare)

    def load_hub(self) -> LoadedWeights:
        """Download the publisher's weights.

        Raises:
            OSError: as the hub client says.
        """
        return self._convert("hub", HUB[self.name])

    def _convert(self, source: str, repository: str | None, **state: Any) -> LoadedWeights:
        """Let transformers translate the names of its earlier versions."""
        fix = "give weights of the same architecture, or change the encoder's name"
        try:
            with _quiet():
                backbone, report = type(self.backbone).from_pretrained(
                    repository, config=self.backbone.config, output_loading_info=True, dtype=torch.float32, **state
                )
        except RuntimeError as error:  # the one that transformers raises for shapes
            raise InputError(source, f"has tensors of other shapes than hf:{self.name}", fix) from error
        missing = sorted(name for name in report["missing_keys"] if ADDED_NORMS not in name)
        total = len(self.backbone.state_dict())
        if missing:
            rule = f"has {total - len(missing)} of the {total} tensors of hf:{self.name}; missing: {missing[0]}, ..."
            raise InputError(source, rule, fix)
        extra = sorted(report["unexpected_keys"])
        foreign = [name for name in extra if any(part in name for part in (".blocks.", ".layer.", ".layers."))]
        if foreign:
            raise InputError(source, f"has {len(foreign)} tensors more than hf:{self.name}: {foreign[0]}, ...", fix)
        self.backbone.load_state_dict(backbone.state_dict())
        return LoadedWeights(source, total - len(report["missing_keys"]), tuple(extra))


def _build(name: str, output_stride: int | None) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    import transformers as library

    transformers: Any = library  # its configurations take more arguments than they declare
    if name in MIT:
        channels, depths = MIT[name]
        steps = MIT_STRIDES[output_stride]
        # B0 to B5 share heads, reductions and patch sizes, which are the defaults of SegformerConfig
        mit = transformers.SegformerConfig(hidden_sizes=list(channels), depths=list(depths), strides=list(steps))
        strides = tuple(int(torch.tensor(steps[: index + 1]).prod()) for index in range(4))
        return transformers.SegformerModel(mit), channels, strides
    if name in SWIN:
        width, depths, heads = SWIN[name]
        swin = transformers.SwinConfig(
            embed_dim=width,
            depths=list(depths),
            num_heads=list(heads),
            out_features=[f"stage{index}" for index in (1, 2, 3, 4)],
        )
        backbone = transformers.SwinBackbone(swin)
        backbone.swin.layernorm.requires_grad_(False)  # of the classifier; the maps have norms of their own
        return backbone, tuple(width * 2**index for index in range(4)), (4, 8, 16, 32)
    width, blocks, heads_count = DINOV2[name]
    dino = transformers.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads_count,
        image_size=518,
        patch_size=DINOV2_PATCH,
        out_features=[f"stage{blocks * quarter // 4}" for quarter in (1, 2, 3, 4)],
    )
    backbone = transformers.Dinov2Backbone(dino)
    backbone.embeddings.mask_token.requires_grad_(False)  # for masked pretraining only; never in a graph here
    return backbone, (width,) * 4, (DINOV2_PATCH,) * 4


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and load reports: what matters in them becomes an InputError."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
