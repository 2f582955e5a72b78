"""CVM: contrast-based variational model, segmentation from a few points."""

from tissuehint.methods.cvm.config import CVMConfig
from tissuehint.methods.cvm.contrast import contrast_maps
from tissuehint.methods.cvm.method import CVM

__all__ = ["CVM", "CVMConfig", "contrast_maps"]
