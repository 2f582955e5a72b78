"""A classifier with class maps as a weak method: what ``cam`` and ``gland`` share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import TagConfig, TagMethod
from tissuehint.nn.class_maps import ClassMapNetwork, ClassMaps, ClassMapSettings
from tissuehint.nn.optimization import Optimization, build_optimizer


class ClassMapConfig(TagConfig, ClassMapSettings):
    """The network, and how it is trained and read.

    Args:
        optimization: optimiser, learning rates, schedule. Attention, classifier and pooling learn at the head rate.
    """

    optimization: Optimization = Optimization()


class ClassMapMethod(TagMethod):
    """Train a classifier on tags, read its class maps."""

    channels_last: ClassVar[bool] = True
    config: ClassMapConfig

    def __init__(self, config: ClassMapConfig, labels: LabelSpace) -> None:
        super().__init__(config, labels)
        self.network = ClassMapNetwork(config, labels.num_tissue)

    def class_maps(self, images: Tensor) -> ClassMaps:
        """Class maps and logits, (B,C,h,w) and (B,C)."""
        output: ClassMaps = self.network(images)
        return output

    def configure_optimizers(self) -> Any:
        """Encoder at the base rate; attention with its gammas, classifier and pooling at the head rate."""
        return build_optimizer(self.config.optimization, self.network, self.total_steps())

    @torch.no_grad()
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """``class_maps``: as read (B,C,h,w), mean over the views; ``presence``: predicted presence (B,C,1,1).

        With pyramid fusion also ``before_pooling`` and ``pyramid``: F and P' of the plain view.
        """
        seen = self.augmented(batch.images)
        maps = {"class_maps": seen.maps, "presence": seen.logits.sigmoid()[:, :, None, None]}
        if self.config.pooling == "pyramid_fusion":
            pooled = self.network.pooled(batch.images)
            assert pooled.fused is not None
            maps |= {"before_pooling": pooled.class_maps, "pyramid": pooled.fused}
        return maps
