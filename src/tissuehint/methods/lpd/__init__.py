"""LPD: learnable prototypes with diversity regularisation."""

from tissuehint.methods.lpd.config import DiversityConfig, LPDConfig, LPDMatchingConfig
from tissuehint.methods.lpd.method import LPD
from tissuehint.nn.diversity import correlation_diversity_loss, jeffreys_diversity_loss, prototype_coverage

__all__ = [
    "LPD",
    "DiversityConfig",
    "LPDConfig",
    "LPDMatchingConfig",
    "correlation_diversity_loss",
    "jeffreys_diversity_loss",
    "prototype_coverage",
]
