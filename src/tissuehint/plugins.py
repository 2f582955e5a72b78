"""Where methods live: names to lazy import paths, and entry points of other packages."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any

from tissuehint.errors import InputError

ENTRY_POINT_GROUP = "tissuehint.methods"
METHODS = {
    "cam": "tissuehint.methods.cam:CAM",
    "gland": "tissuehint.methods.gland:Gland",
    "pbip": "tissuehint.methods.pbip:PBIP",
    "lpd": "tissuehint.methods.lpd:LPD",
    "vslp": "tissuehint.methods.vslp:VSLP",
    "cvm": "tissuehint.methods.cvm:CVM",
}


def method_names() -> list[str]:
    """Names of the built-in methods, then those that other packages add by the entry-point group."""
    others = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)} - METHODS.keys()
    return [*METHODS, *sorted(others)]


def load_method(name: str) -> Any:
    """The ``WeakMethod`` class of a name.

    Raises:
        InputError: unknown name.
    """
    path = METHODS.get(name)
    if path is None:
        points = entry_points(group=ENTRY_POINT_GROUP, name=name)
        if not points:
            known = method_names()
            near = difflib.get_close_matches(name, known, n=3) or known
            raise InputError(f"method '{name}'", "is unknown", f"use one of {', '.join(near)}")
        return next(iter(points)).load()
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
