"""The run directory: the whole record of an experiment, and what makes it resumable."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from tissuehint.errors import InputError
from tissuehint.files import write_json, write_text
from tissuehint.pipeline.recipe import Recipe

DONE_FILE = "done.json"
RECIPE_FILE = "recipe.yaml"
# keys that change how a run is carried out or looked at, but not what is trained
FREE_KEYS = (
    "name", "output", "evaluation", "published", "data.root", "data.workers", "data.cache_mb", "trainer.accelerator",
    "trainer.devices", "trainer.num_nodes", "trainer.strategy", "trainer.tensorboard", "trainer.progress",
)  # fmt: skip
PACKAGES = (
    "torch", "torchvision", "timm", "segmentation-models-pytorch", "transformers", "lightning", "numpy", "scipy",
    "pillow", "pydantic", "safetensors",
)  # fmt: skip


class RunDirectory:
    """Folders and marks of one run.

    Args:
        path: the run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stage1 = path / "stage1"
        self.pseudo_masks = path / "pseudo_masks"
        self.stage2 = path / "stage2"
        self.ceiling = path / "ceiling"
        self.model = path / "model"
        self.gallery = path / "gallery"
        self.scores = path / "scores.json"
        self.report = path / "report.html"

    @classmethod
    def open(cls, recipe: Recipe, *, writer: bool = True) -> RunDirectory:
        """Make the directory of a recipe, or enter the one that an earlier, killed run of the same recipe left.

        Args:
            recipe: what is run.
            writer: False in processes that must not write (all but the first).

        Raises:
            InputError: the directory holds a run of another recipe, or is no run directory and not empty.
        """
        run = cls(Path(recipe.output).expanduser() / recipe.name)
        record = run.path / RECIPE_FILE
        if record.is_file():
            run._same_recipe(recipe)
        elif run.path.is_dir() and any(run.path.iterdir()):
            fix = "choose another name (-o name=...) or folder (--out)"
            raise InputError(run.path, "is not empty and holds no run", fix)
        if writer:
            run.path.mkdir(parents=True, exist_ok=True)
            write_text(record, recipe.to_yaml())
        return run

    def is_done(self, folder: Path) -> bool:
        """Whether a stage is finished."""
        return (folder / DONE_FILE).is_file()

    def mark_done(self, folder: Path, **facts: Any) -> None:
        """Say that everything of a stage is written."""
        write_json(folder / DONE_FILE, {"finished": _now(), **facts})

    def read_done(self, folder: Path) -> dict[str, Any]:
        """What ``mark_done`` said."""
        facts: dict[str, Any] = json.loads((folder / DONE_FILE).read_text(encoding="utf-8"))
        return facts

    def _same_recipe(self, recipe: Recipe) -> None:
        before, now = _flat(_read_record(self.path / RECIPE_FILE)), _flat(recipe.model_dump(mode="json"))
        for key in sorted(before.keys() | now.keys()):
            if key.startswith(FREE_KEYS) or before.get(key) == now.get(key):
                continue
            rule = f"holds a run with {key} = {before.get(key)!r}, the recipe now says {now.get(key)!r}"
            raise InputError(self.path, rule, "choose another name (-o name=...), or delete the directory")


def write_environment(run: RunDirectory, seed: int, notes: tuple[str, ...]) -> None:
    """Write ``environment.json``: versions, commit, hardware, seed, and the notes of the data set."""
    write_json(run.path / "environment.json", {**environment(), "seed": seed, "notes": list(notes)})


def environment() -> dict[str, Any]:
    """Versions, commit, hardware and command of this process."""
    import torch

    from tissuehint import __version__

    cuda = torch.cuda.is_available()
    return {
        "tissuehint": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": _now(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout that the code runs from, with + where it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    if not (folder.parents[2] / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        rule = "is no record of a run, so what stands beside it cannot be gone on with"
        raise InputError(path, rule, "choose another name (-o name=...), or delete the directory")
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        rows.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return rows
