"""``tissuehint run``: carry out a recipe, for one seed or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tissuehint.cli.experiments import Finished
    from tissuehint.pipeline import Recipe


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe (tissuehint methods).")],
    override: Annotated[
        list[str] | None,
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Change a key: -o stage1.steps=100. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of run directories; same as -o output=DIR.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed; same as -o seed=N.")] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="One run per seed, named NAME-seedN; prints mean +- std.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Run a recipe.

    Train on hints, make pseudo masks, train on them, score, write the report and the model. The run directory is
    OUT/NAME. A run that was killed goes on where it stopped when the same command is given again. With the recipe key
    cross_validation each fold is a run, OUT/NAME/fold_0 and so on, and OUT/NAME holds their means.
    """
    from tissuehint.cli.experiments import carry_out, read_recipe
    from tissuehint.errors import InputError
    from tissuehint.pipeline.processes import is_writer
    from tissuehint.pipeline.recipe import parse_override

    overrides = dict(parse_override(text) for text in override or ())
    if out is not None:
        overrides["output"] = str(out)
    overrides |= progress_overrides(quiet)
    if seeds is not None:
        if seed is not None:
            raise InputError("--seed and --seeds", "exclude each other", "give one of them")
        _run_seeds(read_recipe(recipe, overrides), _parse_seeds(seeds))
        return
    if seed is not None:
        overrides["seed"] = seed
    finished = carry_out(read_recipe(recipe, overrides))
    if is_writer():
        show(finished)


def progress_overrides(quiet: bool) -> dict[str, Any]:
    """Recipe keys that ``--quiet`` stands for."""
    return {"trainer.progress": False} if quiet else {}


def show(finished: Finished) -> None:
    """Print the scores of a run and where its report is."""
    from tissuehint.cli.output import say
    from tissuehint.cli.scores import print_scores, print_summary

    result = finished.result
    if "cross_validation" in result.scores:
        _show_folds(finished)
        return
    if not result.scores["rows"]:
        say("Nothing was scored: no image of the scored splits has a mask.")
    print_scores(result.scores["rows"], f"Scores of {result.scores['run']}, seed {result.scores['seed']}")
    print_summary(result.scores)
    for line in result.scores.get("notes", ()):
        say(f"note  {line}")
    say(f"seconds: {finished.seconds:.0f}")
    say(f"report: {result.report}")


def _show_folds(finished: Finished) -> None:
    from tissuehint.cli.output import say

    result = finished.result
    scores = result.scores
    if not scores["rows"]:
        say("Nothing was scored: no image of the scored splits has a mask.")
    _show_means(scores["run"], f"{len(scores['runs'])} folds, seed {scores['seed']}", scores)
    for line in scores["notes"]:
        say(f"note  {line}")
    say(f"seconds: {finished.seconds:.0f}")
    say(f"report: {result.report}")


def _parse_seeds(text: str) -> list[int]:
    from tissuehint.errors import InputError

    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        rule = "is no list of different whole numbers from 0 on"
        raise InputError(f"--seeds {text}", rule, "write for example --seeds 0,1,2")
    return seeds


def _run_seeds(recipe: Recipe, seeds: Sequence[int]) -> None:
    """One run per seed, then means."""
    from tissuehint.cli.experiments import carry_out
    from tissuehint.cli.output import say
    from tissuehint.errors import InputError
    from tissuehint.files import write_json
    from tissuehint.pipeline import load_recipe
    from tissuehint.pipeline.processes import is_writer

    if recipe.cross_validation is not None and recipe.cross_validation.fold is not None:
        rule = "does not go with --seeds, whose summary is over whole cross-validations"
        raise InputError(f"recipe key cross_validation.fold = {recipe.cross_validation.fold}", rule, "leave one out")
    runs = []
    for seed in seeds:
        named = load_recipe(recipe, {"name": f"{recipe.name}-seed{seed}", "seed": seed})
        if is_writer():
            say(f"seed {seed}: {named.output}/{named.name}")
        runs.append(carry_out(named))
    if not is_writer():
        return
    summary = summarise(recipe.name, seeds, runs)
    target = Path(recipe.output).expanduser() / f"{recipe.name}-seeds.json"
    write_json(target, summary)
    folds = "" if recipe.cross_validation is None else ", of the means over the folds"
    _show_means(recipe.name, f"the seeds {', '.join(map(str, seeds))}{folds}", summary)
    say(f"seconds: {sum(run.seconds for run in runs):.0f}")
    for finished in runs:
        say(f"report: {finished.result.report}")
    say(f"summary: {target}")


def summarise(name: str, seeds: Sequence[int], runs: Sequence[Finished]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, of every score of every row.

    With cross-validation the value of a seed is its mean over the folds.

    Returns:
        ``rows`` as in ``scores.json``, where each score is ``{"mean", "std", "values"}``, values in the order of
        ``seeds``.
    """
    from tissuehint.pipeline.summary import mean_ratio, mean_rows, plain

    scores = [finished.result.scores for finished in runs]
    rows = mean_rows([[plain(row) for row in one["rows"]] for one in scores])
    ratio = mean_ratio([plain(one["weak_full_ratio"]) for one in scores])
    folders = [finished.result.path.name for finished in runs]
    return {"format": 1, "name": name, "seeds": list(seeds), "runs": folders, "rows": rows, "weak_full_ratio": ratio}


def _show_means(name: str, over: str, summary: Mapping[str, Any]) -> None:
    """Print a summary over seeds or folds."""
    from tissuehint.cli.output import say, table
    from tissuehint.cli.scores import print_legend, sections

    measures = (("miou", "mIoU"), ("dice_mean", "Dice"), ("accuracy", "Acc."), ("boundary_miou", "bIoU"))
    say(f"Mean +- sample standard deviation over {over}")
    for place, rows in sections(summary["rows"]):
        cells = [[row["stage"], row["gate"], *(_cell(row.get(key)) for key, _ in measures)] for row in rows]
        table(f"{name}: {place}", ["stage", "gate", *(title for _, title in measures)], cells, numbers=len(measures))
    print_legend(summary["rows"])
    ratio = summary["weak_full_ratio"]
    if ratio is not None:
        say(f"weak/full ratio: mIoU {_cell(ratio['miou'])}, Dice {_cell(ratio['dice_mean'])}")


def _cell(score: Mapping[str, Any] | None) -> str:
    """Mean and spread of a score, and how many of the runs have it where some have not."""
    if score is None:
        return "-"
    values = score["values"]
    defined = sum(value is not None for value in values)
    some = f" ({defined} of {len(values)})" if 0 < defined < len(values) else ""
    return mean_and_std(score["mean"], score["std"]) + some


def mean_and_std(mean: float, std: float) -> str:
    """``0.712 +- 0.010``; the mean alone where one value has no spread."""
    from tissuehint.cli.output import decimal

    return f"{decimal(mean)} +- {decimal(std)}" if decimal(std) != "-" else decimal(mean)
