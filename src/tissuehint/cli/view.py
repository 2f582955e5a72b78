"""``tissuehint view``: predicted slides in the browser, served by this computer to itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tissuehint.slides.view.collection import Collection


def view(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that tissuehint predict --out wrote.")],
    slides: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A folder with the slide files, to see them under the maps; repeatable."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the address only.")] = False,
) -> None:
    """Look at predicted slides with their class maps.

    Serves a page to this computer only and prints its address; Ctrl-C ends it. Nothing is read but DIR and the folders
    of --slides, and nothing comes from the internet.
    """
    from tissuehint.cli.output import note, say
    from tissuehint.slides.view.collection import Collection
    from tissuehint.slides.view.server import Viewer, address, bind, serve

    collection = Collection(folder, slides or ())
    listener = bind(port)
    if not quiet:
        for line in _notes(collection):
            note(line)
    say(address(listener))
    sys.stdout.flush()  # a program that waits for the address reads from a pipe
    if browser:
        _open_browser(address(listener))
    if not quiet:
        note("Ctrl-C ends the viewer.")
    serve(Viewer(collection), listener)
    if not quiet:
        note("The viewer has ended.")


def _notes(collection: Collection) -> list[str]:
    """What the folder holds, which slides have no map, and which files are not there to be shown."""
    records = list(collection.records())
    counts = [f"{len(records)} slides" if len(records) != 1 else "1 slide"]
    counts += [
        f"{count} {state}" for state in ("failed", "running") if (count := sum(one.state == state for one in records))
    ]
    lines = [f"{collection.root}: {', '.join(counts)}"]
    missing: dict[str, list[str]] = {}
    for record in records:
        if record.geometry is not None:
            path, reason = collection.finder.find(record.geometry)
            if path is None:
                missing.setdefault(reason, []).append(record.name)
    for reason, names in missing.items():
        some = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        lines.append(f"{some}: shown as thumbnail; {reason}")
    return lines


def _open_browser(url: str) -> None:
    """In a thread: some browsers come back only when they are closed."""
    import threading
    import webbrowser

    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
