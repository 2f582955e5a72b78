"""Settings of stage 2."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tissuehint.nn.config import NetworkConfig
from tissuehint.nn.optimization import Optimization


class SegmentationConfig(BaseModel):
    """A network, its crops, its budget.

    Args:
        network: architecture and encoder.
        loss: how a pixel counts: all alike (``cross_entropy``), by how easy and how sure it is (``purified``, Feng et
            al. 2025), or by how easy it is (``reweighted``, OEEM). ``ceiling: true`` takes cross-entropy in its place:
            true masks need no purifying.
        loss_warmup: first steps with plain cross-entropy, before ``loss`` begins. The weights of ``purified`` and
            ``reweighted`` come from what the network says; one that knows nothing yet is held back by them
            (docs/benchmarks.md). The papers have no warm-up.
        optimization: optimiser, learning rates, schedule.
        steps: optimiser steps; rounded to whole rounds.
        batch_size: crops a step, over all devices.
        round_steps: steps between two validations and checkpoints.
        crop: side in pixels of training crops and of inference windows; None trains on whole images, smaller ones
            mirrored to the largest of a batch, and predicts them whole.
        stride: step in pixels between inference windows; None takes ``crop`` (no overlap).
        keep: weights that are kept at the end: of the ``last`` round, or of the round with the best mIoU on the
            validation split (``best``), which looks at validation masks, as the published systems do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    network: NetworkConfig = NetworkConfig()
    loss: Literal["cross_entropy", "purified", "reweighted"] = "cross_entropy"
    loss_warmup: int = Field(default=0, ge=0)
    optimization: Optimization = Optimization()
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1)
    round_steps: int = Field(default=100, ge=1)
    crop: int | None = Field(default=224, ge=32)
    stride: int | None = Field(default=None, ge=1)
    keep: Literal["last", "best"] = "last"

    @model_validator(mode="after")
    def _no_gaps(self) -> SegmentationConfig:
        if self.stride is not None and self.crop is None:
            raise ValueError(f"stride {self.stride} is between inference windows, but crop is null: there are none")
        if self.stride is not None and self.crop is not None and self.stride > self.crop:
            raise ValueError(f"stride {self.stride} is larger than crop {self.crop}: pixels between windows are lost")
        return self
