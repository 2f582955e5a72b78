"""Stage 2: a segmentation network trained on pseudo masks, or on true masks for the fully supervised ceiling."""

from tissuehint.segmentation.config import SegmentationConfig
from tissuehint.segmentation.losses import cross_entropy, purified_label_loss, reweighted_loss
from tissuehint.segmentation.module import SegmentationModule

__all__ = ["SegmentationConfig", "SegmentationModule", "cross_entropy", "purified_label_loss", "reweighted_loss"]
