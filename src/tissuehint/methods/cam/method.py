"""CAM as a weak method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import ClassMaps, MethodConfig, TagMethod
from tissuehint.methods.cam.config import CAMConfig
from tissuehint.methods.cam.model import CAMNetwork
from tissuehint.nn.optimization import build_optimizer


class CAM(TagMethod):
    """Train a classifier on tags, read its class activation maps.

    Source: Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """

    Config: ClassVar[type[MethodConfig]] = CAMConfig
    config: CAMConfig

    def __init__(self, config: CAMConfig, labels: LabelSpace) -> None:
        super().__init__(config, labels)
        self.network = CAMNetwork(config, labels.num_tissue)

    def class_maps(self, images: Tensor) -> ClassMaps:
        """Class maps and logits, (B,C,h,w) and (B,C)."""
        output: ClassMaps = self.network(images)
        return output

    def configure_optimizers(self) -> Any:
        """Encoder at the base rate, classifier at the head rate."""
        return build_optimizer(self.config.optimization, self.network, self.total_steps())

    @torch.no_grad()
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """``class_maps``: raw maps (B,C,h,w); ``presence``: predicted presence (B,C,1,1)."""
        seen = self.augmented(batch.images)
        return {"class_maps": seen.maps, "presence": seen.logits.sigmoid()[:, :, None, None]}
