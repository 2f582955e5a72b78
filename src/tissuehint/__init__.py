"""tissuehint: cheap pathology hints in, dense tissue maps out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tissuehint.labels import LabelSpace, Points, Proportions, Tags
    from tissuehint.model import TissueModel
    from tissuehint.pipeline import run

__version__ = "0.1.0"
__all__ = ["LabelSpace", "Points", "Proportions", "Tags", "TissueModel", "__version__", "run"]

# name -> module; resolved on first use, so that `import tissuehint` and `tissuehint --help` stay fast
_LAZY = {
    "LabelSpace": "tissuehint.labels",
    "Points": "tissuehint.labels",
    "Proportions": "tissuehint.labels",
    "Tags": "tissuehint.labels",
    "TissueModel": "tissuehint.model",
    "run": "tissuehint.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tissuehint' has no attribute '{name}'")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
