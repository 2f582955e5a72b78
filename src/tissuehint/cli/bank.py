"""``tissuehint bank``: the image bank of pbip by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from tissuehint.labels import LabelSpace
    from tissuehint.methods.pbip.score import BankScore

app = typer.Typer(help="The image bank of pbip.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bank() -> None:
    """The image bank of pbip."""


@app.command("score")
def score(
    recipe: Annotated[str, typer.Argument(help="A pbip recipe (file or shipped name), or the directory of a run.")],
    override: Annotated[
        list[str] | None,
        typer.Option("-o", "--override", metavar="KEY=VALUE", help="Change a key of the recipe. Repeatable."),
    ] = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Patches that are classified.")] = "test",
    similarity: Annotated[
        Literal["mean", "nearest"], typer.Option(help="Over the prototypes of a class: mean cosine, or the largest.")
    ] = "mean",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores.")] = None,
) -> None:
    """Score the image prompts without training: give patches to the class whose prototypes they look like.

    Makes the bank where it is missing, in the run directory of the recipe, where a run of it finds it. Patches with a
    single tag are classified; F1 is the mean over the classes (Table 6 of the paper).
    """
    from tissuehint.cli.output import say
    from tissuehint.files import write_json
    from tissuehint.methods.pbip.score import score_bank

    method, data, folder = _bank_of(recipe, override or [])
    bank = method.read_bank(folder)
    items = data.hints(split, "tags")
    nearest = similarity == "nearest"
    found = score_bank(items, bank, method.image_encoder, device=method.device, nearest=nearest)
    _print(found, data.labels, f"{split}, {int(found.confusion.sum())} patches with a single tag")
    for note in bank.notes:
        say(f"note  {note}")
    say(f"pictures: {folder}")
    if json_file is not None:
        names = data.labels.names
        write_json(
            json_file,
            {
                "split": split,
                "similarity": similarity,
                "f1_mean": found.f1_mean,
                "accuracy": found.accuracy,
                "f1": {name: value if value == value else None for name, value in zip(names, found.f1, strict=False)},
                "confusion": found.confusion.tolist(),
            },
        )


def _bank_of(recipe: str, overrides: list[str]) -> tuple[Any, Any, Path]:
    """The prepared method, its data, and the folder of its bank."""
    import torch

    from tissuehint.cli.experiments import no_remains
    from tissuehint.data.folds import fold_dataset
    from tissuehint.data.module import TissueData, load_dataset
    from tissuehint.errors import InputError
    from tissuehint.methods.pbip import PBIP
    from tissuehint.pipeline.cross_validation import chosen_fold
    from tissuehint.pipeline.directory import RECIPE_FILE, RunDirectory
    from tissuehint.pipeline.inference import inference_device
    from tissuehint.pipeline.recipe import load_recipe, parse_override

    place = Path(recipe)
    if place.is_dir():
        place = place.resolve()
        if overrides:
            rule = "is the directory of a run, whose recipe is settled"
            raise InputError(place, rule, "give the name of a recipe with -o, or leave -o out")
        if not (place / RECIPE_FILE).is_file():
            rule = f"is a folder without {RECIPE_FILE}, so no run"
            raise InputError(place, rule, "give the directory of a run, a recipe file, or the name of a recipe")
        checked = load_recipe(place / RECIPE_FILE, {"output": str(place.parent), "name": place.name})
    else:
        checked = load_recipe(recipe, dict(parse_override(text) for text in overrides))
    config = checked.method
    if config is None or config.name != "pbip":
        name = "none" if config is None else config.name
        raise InputError(f"method {name}", "has no image bank", "give a recipe of pbip")
    dataset = load_dataset(checked.data)
    if checked.cross_validation is not None:
        if checked.cross_validation.fold is None:
            rule = "has a bank in each fold, made of other training images"
            raise InputError("recipe with cross_validation", rule, "choose one: -o cross_validation.fold=0")
        checked = chosen_fold(checked)
        assert checked.cross_validation is not None
        dataset = fold_dataset(dataset, checked.cross_validation)
    data = TissueData(dataset, checked.data, checked.seed)
    torch.manual_seed(checked.seed)
    method = PBIP(config, data.labels).to(inference_device(checked.trainer))  # type: ignore[arg-type]
    run = RunDirectory.open(checked, writer=False)
    folder = run.stage1 / "prepared"
    if run.is_done(run.stage1):  # trained with this bank: read, never made anew
        method.read(folder, data)
        return method, data, folder
    with no_remains(run.path):
        RunDirectory.open(checked)
        method.prepare(data, folder)
    return method, data, folder


def _print(found: BankScore, labels: LabelSpace, title: str) -> None:
    from tissuehint.cli.output import decimal, table

    names = labels.names[: len(found.f1)]
    rows = [
        [name, decimal(f1), *(str(int(number)) for number in row)]
        for name, f1, row in zip(names, found.f1, found.confusion, strict=True)
    ]
    rows.append(["all", decimal(found.f1_mean), *("" for _ in names)])
    heads = ["class", "F1", *(f"as {name}" for name in names)]
    table(f"Image prompts: {title}; accuracy {decimal(found.accuracy)}", heads, rows, numbers=len(heads) - 1)
