"""Runs as the command line carries them out: say what is there already, leave nothing half-made, say how to go on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tissuehint.cli.output import say
from tissuehint.errors import InputError
from tissuehint.failures import InterruptedRunError, was_interrupted

if TYPE_CHECKING:
    from tissuehint.pipeline import Recipe, RunResult

STAGES = ("stage1", "pseudo_masks", "stage2", "ceiling")


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    Args:
        result: its directory and scores.
        seconds: of this command.
    """

    result: RunResult
    seconds: float


def read_recipe(recipe: str, overrides: Mapping[str, Any]) -> Recipe:
    """A checked recipe from a file or shipped name.

    Raises:
        InputError: as ``load_recipe`` says.
    """
    from tissuehint.pipeline import load_recipe

    return load_recipe(recipe, overrides)


def carry_out(recipe: Recipe) -> Finished:
    """Run a recipe, or what is left of it, in its run directory; with cross-validation all its folds, or the one asked.

    Raises:
        InputError: as ``run`` says; a run directory without any finished work, made by this command, is gone then.
        InterruptedRunError: Ctrl-C.
    """
    rules = recipe.cross_validation
    if rules is None:
        return _carry_out_one(recipe)
    from tissuehint.pipeline.cross_validation import chosen_fold, cross_validate
    from tissuehint.pipeline.stages import RunResult

    if rules.fold is not None:
        return _carry_out_one(chosen_fold(recipe))
    started = time.monotonic()
    result = RunResult(*cross_validate(recipe, _scores_of_fold))
    return Finished(result, time.monotonic() - started)


def _scores_of_fold(recipe: Recipe) -> Mapping[str, Any]:
    from tissuehint.pipeline.processes import is_writer

    rules = recipe.cross_validation
    assert rules is not None
    assert rules.fold is not None
    if is_writer():
        say(f"fold {rules.fold + 1} of {rules.folds}: {Path(recipe.output).expanduser() / recipe.name}")
    return _carry_out_one(recipe).result.scores


def _carry_out_one(recipe: Recipe) -> Finished:
    from tissuehint.pipeline.directory import RunDirectory
    from tissuehint.pipeline.processes import is_writer
    from tissuehint.pipeline.stages import Experiment

    # refuses the run of another recipe before anything is said about it
    folder = RunDirectory.open(recipe, writer=False).path
    if is_writer():
        _announce(folder, recipe)
    started = time.monotonic()
    with no_remains(folder):
        result = Experiment(recipe).run()
    return Finished(result, time.monotonic() - started)


def _announce(folder: Path, recipe: Recipe) -> None:
    """Say what an earlier run of the same name left."""
    done = [stage for stage in STAGES if (folder / stage / "done.json").is_file()]
    wanted = _wanted(recipe)
    if done and set(wanted) <= set(done):
        say(f"{folder}: finished before; nothing is trained again")
    elif done or any((folder / stage / "checkpoints").is_dir() for stage in STAGES):
        say(f"{folder}: resumed; finished before: {', '.join(done) or 'no stage'}")


def _wanted(recipe: Recipe) -> list[str]:
    weak = recipe.data.labels is None
    wanted = ["stage1"] if weak else []
    wanted += ["pseudo_masks", "stage2"] if weak and recipe.stage2 is not None else []
    return wanted + (["ceiling"] if recipe.ceiling or not weak else [])


@contextmanager
def no_remains(folder: Path) -> Iterator[None]:
    """Remove a run directory that was made in here and in which nothing was finished when the input was refused."""
    made_here = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if was_interrupted(error):
            raise InterruptedRunError(f"interrupted; run the same command again to go on in {folder}") from error
        raise
    except Exception:
        from tissuehint.pipeline.processes import is_writer

        if folder in made_here and is_writer() and folder.is_dir() and not _has_work(folder):
            shutil.rmtree(folder, ignore_errors=True)
            for path in made_here[1:]:
                _remove_if_empty(path)
        raise


def _has_work(folder: Path) -> bool:
    marks = ("*/done.json", "*/checkpoints/*", "pseudo_masks/*.png")
    return any(next(folder.glob(mark), None) is not None for mark in marks)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def read_tables(folder: Path) -> list[list[dict[str, Any]]]:
    """Score rows of a run directory, NaN where ``scores.json`` holds null; those of each fold of a cross-validation.

    Raises:
        InputError: no such file, or damaged.
    """
    scores = _read_scores(folder)
    runs = scores.get("runs")
    return [scores["rows"]] if runs is None else [_read_scores(folder / str(run))["rows"] for run in runs]


def _read_scores(folder: Path) -> dict[str, Any]:
    import json

    path = folder / "scores.json"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
        rows = [{key: float("nan") if value is None else value for key, value in row.items()} for row in scores["rows"]]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(folder, "holds no scores.json", "give the directory of a finished run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"is damaged ({type(error).__name__}: {error})"
        raise InputError(path, rule, "run the recipe again, the scores are made anew") from None
    return {**scores, "rows": rows}
