"""CAM as a weak method."""

from __future__ import annotations

from typing import ClassVar

from tissuehint.methods.base import MethodConfig
from tissuehint.methods.cam.config import CAMConfig
from tissuehint.methods.class_maps import ClassMapMethod


class CAM(ClassMapMethod):
    """Train a classifier on tags, read its class activation maps.

    Source: Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """

    Config: ClassVar[type[MethodConfig]] = CAMConfig
    config: CAMConfig
