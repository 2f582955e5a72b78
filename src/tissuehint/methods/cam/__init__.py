"""Class activation maps: the baseline that every paper compares with."""

from tissuehint.methods.cam.config import CAMConfig
from tissuehint.methods.cam.method import CAM

__all__ = ["CAM", "CAMConfig"]
