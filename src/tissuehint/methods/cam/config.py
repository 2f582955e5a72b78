"""Settings of the CAM baseline."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tissuehint.methods.base import TagConfig
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.optimization import Optimization


class CAMConfig(TagConfig):
    """A classifier whose class maps are read as tissue maps.

    Args:
        encoder: any timm or transformers backbone.
        levels: how many of the coarsest pyramid levels are concatenated before the classifier (OEEM: 3), at the
            resolution of the finest of them.
        dropout: on the features, before the classifier.
        optimization: optimiser, learning rates, schedule.
    """

    name: Literal["cam"] = "cam"
    encoder: EncoderConfig = EncoderConfig()
    levels: int = Field(default=1, ge=1, le=4)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    optimization: Optimization = Optimization()
