"""The gland system: consistency correlation attention and pyramid fusion pooling, for any tissue."""

from tissuehint.methods.gland.config import GlandConfig
from tissuehint.methods.gland.method import Gland
from tissuehint.nn.pyramid_pooling import PyramidFusionPooling

__all__ = ["Gland", "GlandConfig", "PyramidFusionPooling"]
