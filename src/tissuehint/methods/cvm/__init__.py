"""CVM: contrast-based variational model, segmentation from a few points."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tissuehint.methods.cvm.config import CVMConfig
    from tissuehint.methods.cvm.contrast import contrast_maps
    from tissuehint.methods.cvm.method import CVM

__all__ = ["CVM", "CVMConfig", "contrast_maps"]

# `tissuehint segment` needs none of the trainer, whose import takes several times longer than its work
_PLACES = {"CVM": "method", "CVMConfig": "config", "contrast_maps": "contrast"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
