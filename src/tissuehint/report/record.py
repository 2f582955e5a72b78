"""What a run directory says, part by part; a missing part is None or empty, a damaged one is named in ``problems``."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

STAGES = ("stage1", "pseudo_masks", "stage2", "ceiling")
STAGE_TITLES = {
    "tags_only": "Tags alone",
    "stage1": "Stage 1",
    "pseudo_masks": "Pseudo masks",
    "stage2": "Stage 2",
    "ceiling": "Full masks (ceiling)",
}
# folders with pictures that a method left, each with its ``pictures.json``, by the name of their section
PICTURE_PLACES = {"prepared": "stage1/prepared", "illustrated": "stage1/illustrated"}

Point = tuple[float, float]


@dataclass(frozen=True)
class Curves:
    """The log of one stage.

    Args:
        axis: what the first number of a point counts: ``step`` or ``epoch``.
        series: column name -> points (axis value, logged value) in rising order, finite values only.
        not_finite: column name -> how many logged values were NaN or infinite.
    """

    axis: str
    series: Mapping[str, tuple[Point, ...]]
    not_finite: Mapping[str, int]


@dataclass(frozen=True)
class GalleryItem:
    """One image of the gallery: layer name -> file in the gallery folder."""

    id: str
    split: str
    layers: Mapping[str, str]
    miou: float


@dataclass(frozen=True)
class RunRecord:
    """A run directory, read; ``folds`` names those of a cross-validation, whose scores are means and spreads."""

    folder: Path
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any] | None
    done: Mapping[str, Mapping[str, Any]]
    curves: Mapping[str, Curves]
    rows: tuple[Mapping[str, Any], ...]
    ratio: Mapping[str, Any] | None
    scored: bool
    labels: LabelSpace | None
    gallery: tuple[GalleryItem, ...]
    model: Mapping[str, Any] | None
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    folds: tuple[str, ...] = ()
    pictures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def expected(self, stage: str) -> bool:
        """Whether the recipe asks for a stage, or its folder is there."""
        if stage in ("stage1", "pseudo_masks"):
            return stage == "stage1" or self.expected("stage2") or (self.folder / stage).is_dir()
        if stage == "ceiling" or stage not in self.recipe:
            return bool(self.recipe.get(stage)) or (self.folder / stage).is_dir()
        section = self.recipe[stage]
        return bool(section) and not (isinstance(section, Mapping) and section.get("enabled") is False)

    def waiting(self) -> tuple[str, ...]:
        """Stages that the recipe asks for and that are not finished."""
        return tuple(stage for stage in STAGES if self.expected(stage) and stage not in self.done)


def read_run(folder: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        InputError: no readable ``recipe.yaml``; every other part may be missing or damaged.
    """
    problems: list[str] = []
    recipe, recipe_text = _read_recipe(folder / "recipe.yaml")
    scores = _read_json(folder, "scores.json", problems)
    model = _read_json(folder, "model/model.json", problems)
    pictures = {name: _read_json(folder, f"{place}/pictures.json", problems) for name, place in PICTURE_PLACES.items()}
    curves = {stage: _read_curves(folder, f"{stage}/metrics.csv", problems) for stage in _logged(folder)}
    done = {stage: _read_json(folder, f"{stage}/done.json", problems) for stage in STAGES}
    ratio = (scores or {}).get("weak_full_ratio")
    return RunRecord(
        folder=folder,
        recipe=recipe,
        recipe_text=recipe_text,
        environment=_read_json(folder, "environment.json", problems),
        done={stage: value for stage, value in done.items() if value is not None},
        curves={stage: value for stage, value in curves.items() if value is not None},
        rows=_score_rows(scores, problems),
        ratio=ratio if isinstance(ratio, dict) else None,
        scored=scores is not None,
        labels=_labels(scores, "scores.json", problems) or _labels(model, "model/model.json", problems),
        gallery=_gallery(_read_json(folder, "gallery/index.json", problems), problems),
        model=model,
        problems=tuple(problems),
        notes=_texts(scores, "notes", problems),
        folds=_texts(scores, "runs", problems),
        pictures={name: told for name, told in pictures.items() if told is not None},
    )


def is_spread(value: Any) -> bool:
    """Whether this is a score over several runs: its mean, standard deviation and values."""
    return isinstance(value, Mapping) and {"mean", "std", "values"} <= value.keys()


def number(value: Any) -> float:
    """A number as float, the mean of a score over several runs; NaN for null, text and anything else."""
    if is_spread(value):
        return number(value["mean"])
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def _read_recipe(path: Path) -> tuple[Mapping[str, Any], str]:
    import yaml

    try:
        written = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(written)
    except FileNotFoundError:
        raise InputError(path, "is missing, every run directory has one", "give the directory of a run") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(path, f"cannot be read as YAML ({error})", "restore the recipe of the run") from None
    if not isinstance(recipe, dict):
        raise InputError(path, "is not a mapping of keys to values", "restore the recipe of the run")
    return recipe, written


def _read_json(folder: Path, place: str, problems: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads((folder / place).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{place} cannot be read: {_reason(error)}")
        return None
    if isinstance(value, dict):
        return value
    problems.append(f"{place} is not a JSON object")
    return None


def _score_rows(scores: Mapping[str, Any] | None, problems: list[str]) -> tuple[Mapping[str, Any], ...]:
    rows = (scores or {}).get("rows") or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        problems.append("scores.json: 'rows' is not a list of objects")
        return ()
    return tuple(rows)


def _texts(scores: Mapping[str, Any] | None, key: str, problems: list[str]) -> tuple[str, ...]:
    found = (scores or {}).get(key) or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        problems.append(f"scores.json: '{key}' is not a list of texts")
        return ()
    return tuple(found)


def _labels(holder: Mapping[str, Any] | None, name: str, problems: list[str]) -> LabelSpace | None:
    value = (holder or {}).get("labels")
    if value is None:
        return None
    try:
        return LabelSpace.from_dict(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problems.append(f"{name}: 'labels' is no label space ({error})")
        return None


def _gallery(index: Mapping[str, Any] | None, problems: list[str]) -> tuple[GalleryItem, ...]:
    items = (index or {}).get("items") or []
    found = []
    for position, item in enumerate(items if isinstance(items, list) else [items]):
        layers = item.get("layers") if isinstance(item, dict) else None
        if not isinstance(layers, dict):
            problems.append(f"gallery/index.json: item {position} has no layers")
            continue
        files = {str(name): str(file) for name, file in layers.items() if file}
        split = str(item.get("split") or "")
        found.append(GalleryItem(str(item.get("id", position)), split, files, number(item.get("miou"))))
    return tuple(found)


def _logged(folder: Path) -> list[str]:
    """Stages, and below each the phases of a method that trains in several: ``stage1/confidence``."""
    found = []
    for stage in STAGES:
        phases = sorted((folder / stage).glob("*/metrics.csv"), key=lambda path: (path.stat().st_mtime_ns, path))
        found += [stage, *(f"{stage}/{path.parent.name}" for path in phases)]
    return found


def stage_title(stage: str) -> str:
    """What a stage, or a phase of one, is called on the page."""
    name, _, phase = stage.partition("/")
    title = STAGE_TITLES.get(name, name)
    return f"{title}, {phase}" if phase else title


def _read_curves(folder: Path, place: str, problems: list[str]) -> Curves | None:
    """Lightning's CSV log: one row per logging call, each with its own columns filled."""
    try:
        with (folder / place).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{place} cannot be read: {_reason(error)}")
        return None
    axis = "step" if any(row.get("step") for row in rows) else "epoch"
    # keyed by position: a resumed run logs some steps again, the later row holds
    columns: dict[str, dict[float, float]] = {}
    not_finite: dict[str, int] = {}
    for row in rows:
        position = _cell(row.get(axis))
        if position is None or not math.isfinite(position):
            continue
        for name, written in row.items():
            value = None if name in (None, "step", "epoch") else _cell(written)
            if value is not None and math.isfinite(value):
                columns.setdefault(name, {})[position] = value
            elif value is not None:
                not_finite[name] = not_finite.get(name, 0) + 1
    series = {name: tuple(sorted(points.items())) for name, points in columns.items()}
    return Curves(axis, series, not_finite)


def _reason(error: Exception) -> str:
    # the text of an OSError carries the path of this machine
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _cell(written: object) -> float | None:
    try:
        return float(written) if isinstance(written, str) else None
    except ValueError:
        return None
