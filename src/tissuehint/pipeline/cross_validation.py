"""k-fold cross-validation of a recipe: each fold an ordinary run, then means and spreads over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tissuehint.errors import InputError
from tissuehint.files import finite, write_json, write_text
from tissuehint.pipeline.directory import RECIPE_FILE, RunDirectory
from tissuehint.pipeline.processes import is_writer, wait_for_all
from tissuehint.pipeline.recipe import Recipe
from tissuehint.pipeline.summary import mean_ratio, mean_rows
from tissuehint.report import write_report

POOLED = (
    "Scores of a fold are over all pixels of its test images pooled, not means over images; mean and sample standard "
    "deviation (divisor folds - 1) are over the folds."
)
_FOLD = "fold_"


def fold_of(recipe: Recipe, fold: int) -> Recipe:
    """The recipe of one fold; its run directory is ``output/name/fold_<i>``.

    Args:
        recipe: with ``cross_validation``. The recipe of the fold itself, as its run directory keeps it, stays as it is,
            so that it can be run again from there.
        fold: from 0.
    """
    rules = recipe.cross_validation
    assert rules is not None
    name = f"{_FOLD}{fold}"
    if rules.fold == fold and recipe.name == name:
        return recipe
    one = rules.model_copy(update={"fold": fold})
    changes = {"name": name, "output": str(Path(recipe.output) / recipe.name), "cross_validation": one}
    return recipe.model_copy(update=changes)


def chosen_fold(recipe: Recipe) -> Recipe:
    """The recipe of the one ``cross_validation.fold`` that a recipe asks for.

    Raises:
        InputError: ``output/name`` holds something else than this cross-validation.
    """
    rules = recipe.cross_validation
    assert rules is not None
    assert rules.fold is not None
    one = fold_of(recipe, rules.fold)
    if one is not recipe:
        _folder(recipe.model_copy(update={"cross_validation": rules.model_copy(update={"fold": None})}))
    return one


def cross_validate(recipe: Recipe, scores_of: Callable[[Recipe], Mapping[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """Run all folds one after the other, then write ``scores.json``, ``recipe.yaml`` and ``report.html`` of them all.

    A killed cross-validation goes on where it stopped: each fold is a run directory that knows what is finished.

    Args:
        recipe: with ``cross_validation`` and without a single ``fold``.
        scores_of: runs the recipe of a fold, or what is left of it, and gives the content of its ``scores.json``.

    Returns:
        The directory ``output/name`` and the summary. Its ``rows`` are those of ``mean_rows``, its ``runs`` the folders
        of the folds.

    Raises:
        InputError: the directory holds something else; as the folds' runs say.
    """
    assert recipe.cross_validation is not None
    folder = _folder(recipe)
    folds = [fold_of(recipe, fold) for fold in range(recipe.cross_validation.folds)]
    summary: dict[str, Any] = finite(_summary(recipe, folds, [scores_of(fold) for fold in folds]))
    if is_writer():
        write_text(folder / RECIPE_FILE, recipe.to_yaml())
        write_json(folder / "scores.json", summary)
        write_report(folder)
    wait_for_all()
    return folder, summary


def _folder(recipe: Recipe) -> Path:
    """Where the folds and their summary lie; until that is written, nothing but run directories of folds."""
    folder = Path(recipe.output).expanduser() / recipe.name
    if (folder / RECIPE_FILE).is_file():
        return RunDirectory.open(recipe, writer=False).path
    if folder.is_dir() and any(not path.name.startswith((_FOLD, ".")) for path in folder.iterdir()):
        fix = "choose another name (-o name=...) or folder (--out)"
        raise InputError(folder, "is not empty and holds no cross-validation", fix)
    return folder


def _summary(recipe: Recipe, folds: Sequence[Recipe], scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    assert recipe.cross_validation is not None
    told = dict.fromkeys(note for one in scores for note in one["notes"])
    notes = sorted(told, key=lambda note: not all(note in one["notes"] for one in scores))  # those of one fold last
    return {
        "format": 1,
        "run": recipe.name,
        "seed": recipe.seed,
        "cross_validation": recipe.cross_validation.model_dump(mode="json"),
        "runs": [fold.name for fold in folds],
        "labels": scores[0]["labels"],
        "evaluation": recipe.evaluation.model_dump(mode="json"),
        "rows": mean_rows([one["rows"] for one in scores]),
        "published": recipe.published,
        "notes": [POOLED, *notes],
        "weak_full_ratio": mean_ratio([one["weak_full_ratio"] for one in scores]),
    }
