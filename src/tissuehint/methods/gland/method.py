"""The gland system's first stage as a weak method."""

from __future__ import annotations

from typing import ClassVar

from tissuehint.methods.base import MethodConfig
from tissuehint.methods.class_maps import ClassMapMethod
from tissuehint.methods.gland.config import GlandConfig


class Gland(ClassMapMethod):
    """Train a classifier with attention inside and pyramid pooling behind, read its merged class maps.

    The class map that pseudo masks come from is M_c = ReLU(P'_c) ReLU(F_c): the fused pyramid refines the class map, as
    the paper says in words, and M_c is what each cell adds to the positive part of the logit (Eq. 9).

    Source: Feng et al., Weakly Supervised Gland Segmentation with Class Semantic Consistency and Purified Labels
    Filtration, AAAI 2025. Its third part, purified labels, is a loss of stage 2 (``segmentation.purified_label_loss``).
    """

    Config: ClassVar[type[MethodConfig]] = GlandConfig
    config: GlandConfig
