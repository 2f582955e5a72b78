"""``tissuehint methods``: which systems there are, and what each does."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Show the page of this method.")] = None,
    encoders: Annotated[
        bool, typer.Option("--encoders", help="List the frozen image encoders, with licence and access.")
    ] = False,
) -> None:
    """List the methods.

    Hint, idea and shipped recipes; with a name, the page of that method.
    """
    if encoders:
        _encoders(name)
    elif name is None:
        _list()
    else:
        _page(name)


def _list() -> None:
    from tissuehint.cli.output import say, table
    from tissuehint.pipeline.recipe import shipped_recipes
    from tissuehint.plugins import method_names

    recipes = sorted(shipped_recipes())
    rows = []
    for name in method_names():
        own = [recipe for recipe in recipes if recipe.startswith(f"{name}/")]
        rows.append([name, *_hint_and_idea(name), ", ".join(own) or "-"])
    table("", ["method", "hint", "idea", "recipes"], rows, wrap=2)
    say("more: tissuehint methods NAME; use: tissuehint run RECIPE")


def _encoders(name: str | None) -> None:
    from tissuehint.cli.output import say, table
    from tissuehint.errors import InputError
    from tissuehint.nn.image_encoder_catalog import CATALOG

    if name is not None:
        raise InputError(f"methods {name} --encoders", "are two questions", f"leave out {name} or --encoders")
    heads = ["encoder", "architecture; training images", "D", "px", "hub", "licence of weights", "access"]
    rows = [
        [row.name, row.what, str(row.dim), str(row.side), row.hub or "none, see the how-to", row.licence, row.access]
        for row in CATALOG.values()
    ]
    table("", heads, rows, wrap=6)
    say("any name of timm is an image encoder too (resnet50, vit_small_patch16_224): see timm.list_models()")


def _hint_and_idea(name: str) -> tuple[str, str]:
    from tissuehint.plugins import load_method

    try:
        method: Any = load_method(name)
    except Exception as error:  # a broken plug-in of another package must not hide the others
        return "-", f"cannot be loaded: {type(error).__name__}: {error}"
    idea = (inspect.getdoc(method) or "").strip().split("\n\n")[0]
    return str(method.supervision), " ".join(idea.split())


def _page(name: str) -> None:
    import sys

    from tissuehint.cli.output import console, say
    from tissuehint.errors import InputError
    from tissuehint.plugins import load_method

    page = Path(inspect.getfile(load_method(name))).with_name("README.md")
    if not page.is_file():
        raise InputError(f"method '{name}'", "has no README.md beside its class", "ask its authors")
    text = page.read_text(encoding="utf-8")
    if not sys.stdout.isatty():
        say(text.rstrip())
        return
    from rich.markdown import Markdown

    console().print(Markdown(text))
