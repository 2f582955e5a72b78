"""Stage 2 as a Lightning module."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning as L
from torch import Tensor

from tissuehint.data.samples import Batch
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.nn.networks import build_network
from tissuehint.nn.optimization import build_optimizer
from tissuehint.segmentation.config import SegmentationConfig
from tissuehint.segmentation.losses import LOSSES


class SegmentationModule(L.LightningModule):
    """Trains a segmentation network on masks that the data module gives.

    Args:
        config: network, loss, optimiser.
        labels: the classes; the network has ``labels.num_classes`` outputs, white included.
    """

    channels_last: ClassVar[bool] = True

    def __init__(self, config: SegmentationConfig, labels: LabelSpace) -> None:
        super().__init__()
        self.config = config
        self.labels = labels
        self.network = build_network(config.network, labels.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,K,H,W) of images (B,3,H,W) in [0,1]."""
        logits: Tensor = self.network(images)
        return logits

    def predict(self, images: Tensor) -> Tensor:
        """Tissue map (B,K,H,W): softmax of the logits."""
        return self.forward(images).float().softmax(1)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss on the (pseudo) masks of the batch."""
        if batch.masks is None:
            raise InputError(f"images {', '.join(batch.ids[:3])}", "have no mask", "train on pseudo masks or masks")
        warming = self.config.loss_warmup > 0 and self.global_step < self.config.loss_warmup
        name = "cross_entropy" if warming else self.config.loss
        loss = LOSSES[name](self(batch.images), batch.masks)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(batch))
        return loss

    def configure_optimizers(self) -> Any:
        """Encoder at the base rate, decoder and head at the head rate."""
        return build_optimizer(self.config.optimization, self.network, int(self.trainer.estimated_stepping_batches))
