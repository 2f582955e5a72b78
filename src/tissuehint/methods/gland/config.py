"""Settings of the gland system's first stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tissuehint.methods.class_maps import ClassMapConfig
from tissuehint.nn.pyramid_pooling import PoolingName
from tissuehint.nn.stage_attention import AttentionName


class GlandConfig(ClassMapConfig):
    """Consistency correlation attention behind the last stages, pyramid fusion pooling on the class maps.

    Args:
        presence_threshold: as in ``TagConfig``; .25 is that of the released inference code.
    """

    name: Literal["gland"] = "gland"
    attention: AttentionName = "consistency_correlation"
    pooling: PoolingName = "pyramid_fusion"
    presence_threshold: float = Field(default=0.25, ge=0, le=1)
