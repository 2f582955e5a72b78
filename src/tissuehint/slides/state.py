"""``slide.json``: what is known of a slide's prediction; written at the start, and last of all at its end."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from tissuehint.errors import InputError
from tissuehint.files import write_json
from tissuehint.model import CARD_FILE, WEIGHTS_FILE

STATE_FILE = "slide.json"
FORMAT = 1
VERSIONS = ("tissuehint", "torch", "numpy", "openslide-python", "tiffslide", "tifffile", "zarr", "rasterio", "shapely")

State = Literal["running", "failed", "done"]


@dataclass
class SlideState:
    """The record of one slide.

    Args:
        name: of its folder.
        state: ``running`` also stands where a run was killed.
        attempts: how often it was begun.
        slide: where the file lies and what it is; see ``slide_facts``.
        map: size of the map, and its ``Placement``.
        labels: ``LabelSpace.to_dict()``.
        model: hash and origin; see ``model_facts``.
        settings: what decides the result.
        areas: rows of ``areas.csv`` as mappings.
        tissue_mm2: area of the tissue outline.
        seconds: of the attempt that ended it.
        error: one line, where it failed.
        outputs: names of its files.
        versions: of the libraries.
    """

    name: str
    state: State = "running"
    attempts: int = 0
    slide: dict[str, Any] = field(default_factory=dict)
    map: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    areas: list[dict[str, Any]] = field(default_factory=list)
    tissue_mm2: float | None = None
    seconds: float | None = None
    error: str | None = None
    outputs: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Into ``folder/slide.json``, whole or not at all."""
        write_json(folder / STATE_FILE, {"format": FORMAT, **self.__dict__})

    @classmethod
    def read(cls, folder: Path) -> SlideState | None:
        """What an earlier run wrote, or None where there is nothing.

        Raises:
            InputError: a file that is damaged or of a newer format.
        """
        file = folder / STATE_FILE
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            newer = values.pop("format") > FORMAT
            if not newer:
                return _checked(cls(**values))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(file, f"is damaged ({reason})", "delete the folder of this slide") from None
        raise InputError(file, "has a newer format than this version reads", "update tissuehint")


def _checked(state: SlideState) -> SlideState:
    """What a file that was written by hand may have wrong."""
    kinds = {
        "slide": dict,
        "map": dict,
        "labels": dict,
        "model": dict,
        "settings": dict,
        "areas": list,
        "outputs": list,
    }
    for name, kind in kinds.items():
        if not isinstance(getattr(state, name), kind):
            raise TypeError(f"{name} is no {kind.__name__}")
    if not all(isinstance(row, dict) and "class" in row for row in state.areas):
        raise TypeError("areas holds what is no row of a class")
    return state


def slide_facts(path: Path) -> dict[str, Any]:
    """Where a slide lies, its size and age: enough to see that it is still the same file."""
    facts = path.stat()
    return {"path": str(path.resolve()), "bytes": facts.st_size, "modified": facts.st_mtime}


def model_facts(folder: Path, um_per_px: float | None) -> dict[str, Any]:
    """Which model it is: hash of its card and weights."""
    digest = hashlib.sha256()
    for name in (CARD_FILE, WEIGHTS_FILE):
        digest.update(file_hash(folder / name).encode())
    return {"path": str(folder.resolve()), "sha256": digest.hexdigest(), "um_per_px": um_per_px}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
