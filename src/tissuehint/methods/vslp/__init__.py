"""VSLP: variational segmentation from label proportions."""

from tissuehint.methods.vslp.config import (
    ConfidenceConfig,
    FusionConfig,
    LearningConfig,
    ProportionLosses,
    RegulariserConfig,
    VSLPConfig,
)
from tissuehint.methods.vslp.energy import EdgeWeightedTotalVariation, FusionEnergy
from tissuehint.methods.vslp.flow import Flow, minimise
from tissuehint.methods.vslp.method import VSLP
from tissuehint.methods.vslp.total_deep_variation import TotalDeepVariation
from tissuehint.methods.vslp.views import View, ViewConfig

__all__ = [
    "VSLP",
    "ConfidenceConfig",
    "EdgeWeightedTotalVariation",
    "Flow",
    "FusionConfig",
    "FusionEnergy",
    "LearningConfig",
    "ProportionLosses",
    "RegulariserConfig",
    "TotalDeepVariation",
    "VSLPConfig",
    "View",
    "ViewConfig",
    "minimise",
]
