"""A recipe: one typed YAML file that says everything about an experiment."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from tissuehint.data.folds import CrossValidation
from tissuehint.data.module import DataConfig
from tissuehint.errors import InputError
from tissuehint.methods.base import MethodConfig
from tissuehint.metrics.protocols import Protocol
from tissuehint.plugins import load_method
from tissuehint.segmentation.config import SegmentationConfig

FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StageOne(BaseModel):
    """Budget of the method.

    Args:
        steps: optimiser steps; rounded to whole rounds.
        batch_size: items a step, over all devices.
        round_steps: steps between two validations and checkpoints.
    """

    model_config = FROZEN

    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=16, ge=1)
    round_steps: int = Field(default=100, ge=1)


class PseudoMasks(BaseModel):
    """How tissue maps of training images become pseudo masks.

    Args:
        min_confidence: pixels whose largest probability is below this are ignored (255) in stage 2.
        stride: step in pixels between the windows; None takes the stride of ``data.patches``.
    """

    model_config = FROZEN

    min_confidence: float = Field(default=0.0, ge=0, lt=1)
    stride: int | None = Field(default=None, ge=1)


class TrainerSettings(BaseModel):
    """Passed through to the Lightning trainer.

    Args:
        accelerator, devices, num_nodes, strategy, precision: as in ``lightning.Trainer``.
        tensorboard: log for TensorBoard too (extra ``tensorboard``).
        progress: show progress bars.
    """

    model_config = FROZEN

    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    num_nodes: int = Field(default=1, ge=1)
    strategy: str = "auto"
    precision: str = "32-true"
    tensorboard: bool = False
    progress: bool = True


class Evaluation(BaseModel):
    """What is scored and shown.

    Args:
        splits: scored splits.
        protocols: what happens at white pixels; only the first is used where the label space has no white.
        oracle: score stage 1 with the hints of the scored images too, as a row of its own.
        boundary_distances: widths in pixels of the boundary band, besides the default of 2 % of the image diagonal.
        stride: step in pixels between stage-1 inference windows; None takes the stride of ``data.patches``.
        batch_size: windows at a time.
        gallery: images of the first scored split in the report.
    """

    model_config = FROZEN

    splits: tuple[Literal["train", "val", "test"], ...] = ("test",)
    protocols: tuple[Protocol, ...] = ("ignore_white", "fp_on_white", "five_class")
    oracle: bool = True
    boundary_distances: tuple[int, ...] = ()
    stride: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    gallery: int = Field(default=12, ge=0)

    @model_validator(mode="after")
    def _something(self) -> Evaluation:
        if not self.splits or not self.protocols:
            raise ValueError("needs at least one split and one protocol")
        return self


class Recipe(BaseModel):
    """An experiment: data, method, stages, scores.

    Args:
        name: of the run; the run directory is ``output/name``.
        output: folder of run directories.
        seed: of weights, order and augmentation.
        start_from: directory of a finished run on the same classes with the same networks. Each stage starts from the
            weights of its stage of the same name, not from the recipe's own; ``~`` and ``$VARIABLES`` are expanded.
        data: which images and hints.
        cross_validation: deal all images into test folds anew, run each fold and summarise them.
        method: name and settings of stage 1; None only with ``data.labels: masks``.
        stage1: its budget.
        pseudo_masks: from maps to masks.
        stage2: the segmentation network; None ends after stage 1, which is then the model.
        ceiling: train the network of stage 2 with the true masks too, same budget, and report the weak/full ratio. For
            a method of one stage give the network and budget here, as in ``stage2``.
        trainer: passed to Lightning.
        evaluation: what is scored.
        published: numbers of the paper for this experiment, shown beside ours.
    """

    model_config = FROZEN

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str = "runs"
    seed: int = Field(default=0, ge=0)
    start_from: str | None = None
    data: DataConfig
    cross_validation: CrossValidation | None = None
    method: SerializeAsAny[MethodConfig] | None = None
    stage1: StageOne = StageOne()
    pseudo_masks: PseudoMasks = PseudoMasks()
    stage2: SegmentationConfig | None = None
    ceiling: bool | SegmentationConfig = False
    trainer: TrainerSettings = TrainerSettings()
    evaluation: Evaluation = Evaluation()
    published: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.data.labels == "masks" and self.stage2 is None:
            raise ValueError("data.labels: masks trains the network of stage2 alone, but stage2 is not given")
        if self.data.labels is None and self.method is None:
            raise ValueError("method is not given; only data.labels: masks does without")
        if self.ceiling is True and self.stage2 is None:
            raise ValueError("ceiling trains the network of stage2 with masks, but stage2 is not given")
        side = self.data.patches.side if self.data.patches else None
        for key, stride in (("pseudo_masks", self.pseudo_masks.stride), ("evaluation", self.evaluation.stride)):
            if side is not None and stride is not None and stride > side:
                raise ValueError(f"{key}.stride {stride} is larger than data.patches.side {side}: pixels are lost")
        return self

    @field_validator("published", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        # how a recipe that extends another leaves the numbers of the paper out
        return {} if value is None else value

    @property
    def full_supervision(self) -> SegmentationConfig | None:
        """The network that is trained with the true masks, or None."""
        if isinstance(self.ceiling, SegmentationConfig):
            return self.ceiling
        if self.stage2 is None or not (self.ceiling or self.data.labels == "masks"):
            return None
        return self.stage2.model_copy(update={"loss": "cross_entropy"})  # true masks need no purifying

    def to_yaml(self) -> str:
        """The resolved recipe; reading it back gives the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def load_recipe(recipe: Recipe | Mapping[str, Any] | Path | str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A checked recipe.

    Args:
        recipe: a YAML file; the name of a recipe that comes with tissuehint (``cam/phantom``); a mapping; or a recipe.
            A file or mapping with the key ``extends`` gives only what differs from the recipe that it names: a file,
            relative to the one that names it, or a recipe that comes with tissuehint.
        overrides: values by key; ``stage1.steps`` and ``stage1__steps`` mean the same, a mapping is merged.

    Raises:
        InputError: no such file, no YAML, an unknown key (names the nearest), a value that breaks a rule, a recipe that
            extends itself.
    """
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json")
    elif isinstance(recipe, Mapping):
        values = _extended(_copied(recipe), ())
    else:
        path = find_recipe(recipe)
        values = _extended(_read_yaml(path), (path,))
    for key, value in (overrides or {}).items():
        _override(values, key.replace("__", ".").split("."), value)
    if "extends" in values:
        rule = "is read before anything is overridden"
        raise InputError("override extends", rule, "write extends in a recipe file, or run that recipe")
    return _checked(_expanded(values, ""))


def find_recipe(name: Path | str, *, asked_by: Path | None = None) -> Path:
    """A file as given, or a recipe that comes with tissuehint.

    Args:
        name: path, or name of a shipped recipe.
        asked_by: the file whose ``extends`` says ``name``; paths are relative to its folder.

    Raises:
        InputError: neither; lists the nearest names.
    """
    path = Path(name) if asked_by is None else asked_by.parent / Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    key = str(name).removeprefix("recipes/").removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    near = difflib.get_close_matches(key, shipped, n=3) or sorted(shipped)[:6]
    subject = f"recipe {name}" if asked_by is None else f"{asked_by}: extends {name}"
    raise InputError(subject, "is no file and no name of a recipe", f"give a file, or one of {', '.join(near)}")


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with tissuehint, by name: ``<method>/<data set>``."""
    package = Path(__file__).resolve().parents[1]
    # in a wheel the recipes lie inside the package, in a checkout beside src
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if folder.is_dir():
            return {str(path.relative_to(folder).with_suffix("").as_posix()): path for path in folder.glob("*/*.yaml")}
    return {}


def parse_override(text: str) -> tuple[str, Any]:
    """``key=value`` of the command line; the value is YAML.

    Raises:
        InputError: no ``=``, or a value that is no YAML.

    Example:
        >>> parse_override("stage2.steps=20"), parse_override("data.patches=null")
        (('stage2.steps', 20), ('data.patches', None))
    """
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(f"-o {text}", "is not key=value", "write for example -o stage1.steps=100")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"-o {text}", "has a value that is no YAML", "put the value in quotes") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise InputError(f"{path}{line}", f"is no YAML ({problem})", "correct the line") from None
    if not isinstance(values, dict):
        raise InputError(path, "is no recipe: a recipe is a mapping of keys", "start from a file in recipes/")
    return values


def _extended(values: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """Values merged over those of the recipe that they extend.

    Args:
        values: of a recipe as it is written.
        files: the one where they are written, after those that led to it; empty for a mapping.
    """
    if "extends" not in values:
        return values
    own = dict(values)
    name = own.pop("extends")
    asked_by = files[-1] if files else None
    if not isinstance(name, str) or not name:
        subject = f"{asked_by or 'recipe'}: extends {name!r}"
        raise InputError(subject, "is no name of a recipe", "give one file, or one name of a recipe")
    path = find_recipe(name, asked_by=asked_by)
    if path.resolve() in {file.resolve() for file in files}:
        way = " -> ".join(str(file) for file in (*files, path))
        raise InputError(asked_by, f"extends itself ({way})", "take one extends out")
    base = _extended(_read_yaml(path), (*files, path))
    for key, value in own.items():
        _override(base, [key], value)
    return base


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        return _copied(value) if isinstance(value, Mapping) else value

    return {str(key): plain(value) for key, value in values.items()}


def _override(values: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    if isinstance(value, Mapping) and isinstance(values.get(path[-1]), dict):
        for key, item in value.items():
            _override(values[path[-1]], [str(key)], item)
    else:
        values[path[-1]] = _copied(value) if isinstance(value, Mapping) else value


def _expanded(value: Any, key: str) -> Any:
    """Replace $VARIABLES in paths, so that one recipe works on every machine."""
    if isinstance(value, dict):
        return {name: _expanded(item, f"{key}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, str) and key.rpartition(".")[2] in ("weights", "root", "output", "start_from"):
        expanded = os.path.expandvars(value)
        unset = re.search(r"\$\{?(\w+)", expanded)
        if unset:
            rule = f"'{value}' uses the environment variable {unset.group(1)}, which is not set"
            raise InputError(f"recipe key {key}", rule, f"set {unset.group(1)}, or give a path")
        return expanded
    return value


def _checked(values: dict[str, Any]) -> Recipe:
    values = dict(values)
    method = values.get("method")
    if isinstance(method, dict):
        name = method.get("name")
        if not isinstance(name, str):
            raise InputError("recipe key method.name", "is missing", "name a method (tissuehint methods)")
        config = load_method(name).Config
        try:
            values["method"] = config(**method)
        except ValidationError as error:
            raise _as_input_error(error, config, ("method",)) from None
    if isinstance(values.get("ceiling"), dict):  # checked by itself, so that a wrong key is named without its union
        try:
            values["ceiling"] = SegmentationConfig(**values["ceiling"])
        except ValidationError as error:
            raise _as_input_error(error, SegmentationConfig, ("ceiling",)) from None
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise _as_input_error(error, Recipe, ()) from None
    except TypeError:
        unknown = next(key for key in values if not isinstance(key, str))
        raise InputError(f"recipe key {unknown!r}", "is no text", "write keys as words") from None


def _as_input_error(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...]) -> InputError:
    problems = error.errors(include_url=False)
    first = problems[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join([*prefix, *place]) or "(whole)"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = sorted(_keys_at(model, first["loc"][:-1]))
        near = difflib.get_close_matches(place[-1], known, n=3, cutoff=0.5) or known
        word = "nearest known keys" if len(near) < len(known) else "known keys"
        return InputError(f"recipe key {key}", f"is unknown{more}", f"{word}: {', '.join(near)}")
    if first["type"] == "missing":
        return InputError(f"recipe key {key}", f"is missing{more}", "add it to the recipe")
    message = re.sub(r"^(Value|Assertion) error, ", "", first["msg"])
    value = first["input"]
    shown = "" if isinstance(value, dict | BaseModel) else f" = {value!r}"
    return InputError(f"recipe key {key}{shown}", f"{message}{more}", "correct the value")


def _keys_at(model: type[BaseModel], place: tuple[int | str, ...]) -> set[str]:
    """Keys of the model that stands at a place of another; empty where the place is no model."""
    for part in place:
        field = model.model_fields.get(str(part))
        inner = None if field is None else _model_in(field.annotation)
        if inner is None:
            continue  # the tag of a union, not a key
        model = inner
    return set(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = getattr(annotation, "__args__", ())
    return next((model for part in parts if (model := _model_in(part)) is not None), None)
