"""``tissuehint data``: published data sets, checks of your own, simulated hints, synthetic tissue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tissuehint.cli import data_tile

if TYPE_CHECKING:
    from tissuehint.data.records import TissueDataset

app = typer.Typer(help="List, check, weaken, cut and make data sets.")
app.command("tile")(data_tile.tile)


@app.command("list")
def list_catalog(
    name: Annotated[str | None, typer.Argument(help="Show everything about this data set.")] = None,
) -> None:
    """List published data sets.

    With a name, show its layout, classes and splits.
    """
    if name is None:
        _list()
    else:
        _entry(name)


def _list() -> None:
    from tissuehint.cli.output import say
    from tissuehint.data.catalog import CATALOG

    for entry in CATALOG.values():
        say(f"{entry.name:14} {entry.title}")
        for key, value in (
            ("classes", entry.labels.names),
            ("splits", entry.splits),
            ("hints", entry.hints or ("simulated from masks",)),
            ("licence", (entry.licence,)),
        ):
            say(f"{'':14} {key:8} {', '.join(value)}")
    say()
    say("classes, splits and expected files of one: tissuehint data list NAME")


def _entry(name: str) -> None:
    from tissuehint.cli.output import say
    from tissuehint.data import catalog

    entry = catalog.get(name)
    size = "unknown" if entry.um_per_px is None else f"{entry.um_per_px:g} um"
    counts = ", ".join(f"{split} {count}" for split, count in entry.counts.items()) or "not stated"
    say(f"{entry.name}: {entry.title}")
    say(f"classes: {', '.join(f'{index} {label}' for index, label in enumerate(entry.labels.names))}")
    say(f"split schemes: {', '.join(entry.splits)} (the first is the default)")
    say(f"hints in the release: {', '.join(entry.hints) or 'none, they are simulated from masks'}")
    say(f"published images: {counts}")
    say(f"pixel size: {size}")
    say(f"licence: {entry.licence}")
    say(f"cite: {entry.citation}")
    say("layout:")
    for line in entry.layout.strip().splitlines():
        say(f"  {line.strip()}")
    say(f"use: -o data.source={entry.name} -o data.root=FOLDER")


@app.command()
def check(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of your own data.")]) -> None:
    """Report every problem of a data folder.

    One a line, with file and line; exit code 2 if there is an error, 0 where there are only warnings.
    """
    from tissuehint.cli.output import say
    from tissuehint.data.folder_check import check_folder

    problems = check_folder(folder)
    for problem in problems:
        say(str(problem))
    errors = sum(problem.severity == "error" for problem in problems)
    warnings = len(problems) - errors
    say(f"{folder}: {_count(errors, 'error')}, {_count(warnings, 'warning')}")
    if errors:
        raise typer.Exit(2)


@app.command()
def weaken(
    source: Annotated[str, typer.Argument(help="A data set of the catalog, or a folder of your own data.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    root: Annotated[
        Path | None, typer.Option(help="Where the catalog data set lies; else below $TISSUEHINT_DATA.")
    ] = None,
    scheme: Annotated[str | None, typer.Option(help="Split scheme of the data set; else its first.")] = None,
    tag_threshold: Annotated[float, typer.Option(help="A class is tagged above this share of the image.")] = 0.0,
    points: Annotated[int, typer.Option(min=0, help="Points in each class of each image.")] = 2,
    erosion: Annotated[int | None, typer.Option(min=0, help="Pixels from a point to the border of its class.")] = None,
    round_to: Annotated[float | None, typer.Option(help="Round proportions to this step, 0.05 or 0.1.")] = None,
    noise: Annotated[float | None, typer.Option(help="Dirichlet noise of the proportions, 0.01 is mild.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of points and noise.")] = 0,
    masked_only: Annotated[bool, typer.Option("--masked-only", help="Leave out images without a mask.")] = False,
) -> None:
    """Simulate hints from masks.

    Writes images, masks, tags, points and proportions as a data folder (docs/how-to/own-data.md).
    """
    from tissuehint.cli.output import say
    from tissuehint.data.folder import weaken as write_weakened

    dataset = read_source(source, root, scheme)
    if masked_only:
        dataset = _with_masks(dataset)
    rules: dict[str, Any] = {"tag_threshold": tag_threshold, "points_per_class": points, "round_to": round_to}
    rules |= {"noise": noise, "seed": seed} | ({} if erosion is None else {"erosion": erosion})
    write_whole(out, lambda part: write_weakened(dataset, part, **rules))
    counts = ", ".join(f"{split} {len(records)}" for split, records in dataset.splits.items())
    say(f"{out}: {counts} images with simulated tags, points and proportions")
    say(f"check: tissuehint data check {out}")


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder.")],
    train: Annotated[int, typer.Option(min=0, help="Training images.")] = 60,
    val: Annotated[int, typer.Option(min=0, help="Validation images.")] = 20,
    test: Annotated[int, typer.Option(min=0, help="Test images.")] = 20,
    size: Annotated[int, typer.Option(min=32, help="Side in pixels.")] = 224,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same images.")] = 0,
    um_per_px: Annotated[float, typer.Option(help="Pixel size in micrometres.")] = 0.5,
) -> None:
    """Write synthetic tissue as a data folder.

    H&E-like, with exact masks and all three hints.
    """
    from tissuehint.cli.output import say
    from tissuehint.data.phantom import write_phantom

    write_phantom(folder, count=(train, val, test), size=size, seed=seed, um_per_px=um_per_px)
    say(f"{folder}: train {train}, val {val}, test {test} images of {size} x {size} px")


def read_source(source: str, root: Path | None, scheme: str | None) -> TissueDataset:
    """A data set by catalog name, ``phantom``, or the path of a folder of one's own data.

    Raises:
        InputError: neither, or as the readers say.
    """
    from tissuehint.data import catalog
    from tissuehint.errors import InputError

    if source in catalog.names() or source == "phantom" or (source == "folder" and root is not None):
        from tissuehint.data.module import DataConfig, load_dataset

        return load_dataset(DataConfig(source=source, root=None if root is None else str(root), split=scheme))
    if Path(source).is_dir():
        from tissuehint.data.folder import read_folder

        if root is not None or scheme is not None:
            rule = "belongs to a data set of the catalog, not to a folder"
            raise InputError("--root" if root is not None else "--scheme", rule, "leave it out")
        return read_folder(Path(source))
    if "/" in source or "\\" in source:
        raise InputError(source, "is no folder", "check the path")
    catalog.get(source)  # raises: names the nearest
    raise AssertionError(source)


def _with_masks(dataset: TissueDataset) -> TissueDataset:
    from tissuehint.cli.output import note

    splits = {
        split: tuple(record for record in records if record.mask is not None)
        for split, records in dataset.splits.items()
    }
    left_out = sum(len(dataset.splits[split]) - len(records) for split, records in splits.items())
    if left_out:
        note(f"{left_out} images without a mask are left out")
    return replace(dataset, splits=splits, notes=(*dataset.notes, f"{left_out} images without a mask were left out"))


def write_whole(out: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside ``out``, then give it its name: it is whole or absent.

    Raises:
        InputError: ``out`` is a file, or a folder with something in it.
    """
    import shutil
    import tempfile

    from tissuehint.errors import InputError

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(out, "is not empty", "give a new or an empty folder")
    parent = out.absolute().parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name[:80]}.", suffix=".part", dir=parent))
    done = False
    try:
        write(part)
        # mkdtemp makes private folders; take the rights that a plain mkdir gave to images/
        part.chmod((part / "images").stat().st_mode & 0o777)
        if out.is_dir():
            out.rmdir()
        part.replace(out)
        done = True
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for folder in () if done else made:
            folder.rmdir()


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
