"""Settings of the CAM baseline."""

from __future__ import annotations

from typing import Literal

from tissuehint.methods.class_maps import ClassMapConfig


class CAMConfig(ClassMapConfig):
    """A classifier whose class maps are read as tissue maps; without attention, pooled by the mean.

    ``attention`` and ``pooling`` plug the parts of Feng et al. 2025 into it, each with one key.
    """

    name: Literal["cam"] = "cam"
