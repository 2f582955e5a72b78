"""``tissuehint demo``: the main job on synthetic tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RECIPE = "cam/phantom"


def demo(
    out: Annotated[Path, typer.Option(help="Folder of run directories.")] = Path("runs"),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Show the main job on synthetic tissue.

    Image tags in; tissue maps, scores, a report and a model out. Needs no data and no weights; minutes on two cores.
    Run it again and it goes on where it stopped.
    """
    from tissuehint.cli.experiments import carry_out, read_recipe
    from tissuehint.cli.output import say
    from tissuehint.cli.run import progress_overrides, show
    from tissuehint.pipeline.processes import is_writer

    recipe = read_recipe(RECIPE, {"output": str(out), **progress_overrides(quiet)})
    finished = carry_out(recipe)
    if is_writer():
        show(finished)
        say(f"use the model: tissuehint predict {finished.result.path} YOUR_IMAGES --out maps")
        say("your own data: docs/how-to/own-data.md, then tissuehint run RECIPE")
