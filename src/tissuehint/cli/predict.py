"""``tissuehint predict``: images in; masks, areas, overlays and soft maps out."""

from __future__ import annotations

import csv
import glob
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tissuehint.cli.models import Device

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tissuehint.labels import LabelSpace
    from tissuehint.model import TissueModel

AREAS = "areas.csv"
AREA_COLUMNS = ("image", "class", "pixels", "percent_of_tissue", "mm2")
OVERLAY_OPACITY = 0.4
OVERLAY_SIDE = 4096  # larger overlays are shrunk: they are looked at, not measured


class CornerOf(StrEnum):
    """What coordinates are measured from."""

    BOUNDS = "bounds"
    SLIDE = "slide"


class EngineName(StrEnum):
    """What runs the slides of a cohort."""

    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True)
class Job:
    """What is asked for each image."""

    out: Path
    soft: bool
    overlay: bool
    batch_size: int
    um_per_px: float | None

    def targets(self, image: Path) -> list[Path]:
        """Files that are written for an image; the mask first."""
        names = [f"{image.stem}.png"]
        names += [f"{image.stem}_overlay.jpg"] if self.overlay else []
        names += [f"{image.stem}_soft.npz"] if self.soft else []
        return [self.out / name for name in names]


def predict(
    model: Annotated[Path, typer.Argument(help="A run directory or a model folder.")],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Images and slides: files, folders, patterns like '*.svs', CSV tables."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    soft: Annotated[
        bool, typer.Option("--soft", help="Write the class probabilities too: NAME_soft.npz, probabilities.zarr.")
    ] = False,
    overlay: Annotated[bool, typer.Option("--overlay/--no-overlay", help="Write NAME_overlay.jpg of images.")] = True,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Windows at a time; default 8 of an image, half a megapixel of a slide (8 on a GPU)."),
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")
    ] = Device.AUTO,
    um_per_px: Annotated[
        float | None,
        typer.Option(
            "--um-per-px",
            "--mpp",
            help="Pixel size in micrometres: of images (gives areas in mm2; they are resampled to the model's where it "
            "differs, and maps back), and of level 0 of slides that do not state theirs.",
        ),
    ] = None,
    model_mpp: Annotated[
        float | None, typer.Option(help="Slides: um per px at which the model sees them, where it does not know.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=32, help="Slides: side of what the network sees, px.")] = None,
    overlap: Annotated[int | None, typer.Option(min=0, help="Slides: overlap of windows, px.")] = None,
    tissue: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Slides: a threshold of the tissue mask. Repeatable."),
    ] = None,
    outline: Annotated[
        Path | None, typer.Option(help="Slides: GeoJSON of the tissue, instead of looking for it; for one slide.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Slides: how far borders may be simplified, px.")] = 1.5,
    min_area: Annotated[float, typer.Option(min=0, help="Slides: smaller polygons are left out, px of the map.")] = 16,
    origin: Annotated[
        CornerOf, typer.Option(help="Slides: what polygons measure from; QuPath measures from the bounds.")
    ] = CornerOf.BOUNDS,
    readers: Annotated[
        int | None, typer.Option(min=1, help="Slides: threads that read ahead; default one for two cores.")
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="Slides: this machine, or an existing Ray cluster (extra: ray).")
    ] = EngineName.LOCAL,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; default auto.")] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="Workers on the Ray cluster; default one a GPU.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make tissue maps of images and of whole slides.

    For each image: NAME.png (palette mask, values are class indices), NAME_overlay.jpg, and with --soft NAME_soft.npz
    (probabilities: float16 (class, row, column); classes: names). For all: areas.csv. Files of an earlier run are
    replaced.

    For each slide a folder NAME: classes.ome.tif, tissue.geojson.gz (for QuPath), areas.csv, overlay.jpg, and with
    --soft probabilities.zarr. For all: cohort.csv and summary.html. Slides that are finished are skipped, a killed run
    goes on; look at them with tissuehint view. A CSV table of slides has the columns slide, and mpp and outline where
    they are known.

    An image or slide that cannot be read is reported, the others go on, and the exit code is 2.
    """
    from tissuehint.cli.models import load_model
    from tissuehint.cli.predict_slides import SlideOptions, predict_slides, split_words
    from tissuehint.errors import InputError

    if um_per_px is not None and not 0.01 <= um_per_px <= 1000:
        raise InputError(f"--um-per-px {um_per_px}", "is not in 0.01..1000", "give micrometres, 0.5 for a 20x scan")
    slides, others = split_words(images)
    job = Job(out, soft, overlay, batch_size or 8, um_per_px)
    paths = find_images(others) if others else []
    check_targets(paths, job)
    options = SlideOptions(
        model_mpp=model_mpp,
        window=window,
        overlap=overlap,
        soft=soft,
        tissue=tuple(tissue or ()),
        outline=outline,
        tolerance=tolerance,
        min_area=min_area,
        origin=origin.value,
        readers=readers,
        engine=engine.value,
        address=address,
        actors=actors,
        batch_size=batch_size,
        um_per_px=um_per_px,
        quiet=quiet,
    )
    well = True
    if paths:
        well = _predict_images(load_model(model, device), paths, job, quiet=quiet)
    if slides:
        well = predict_slides(model, device, slides, out, options) and well
    if not well:
        raise typer.Exit(2)


def _predict_images(model: TissueModel, paths: Sequence[Path], job: Job, *, quiet: bool) -> bool:
    """Whether all have a result."""
    from tissuehint.cli.output import note, say

    rows, failed = _predict_all(model, paths, job, quiet=quiet)
    if rows:
        _write_areas(job.out / AREAS, rows)
        say(f"{len(paths) - len(failed)} of {len(paths)} images: {job.out}, areas in {job.out / AREAS}")
    if failed:
        note(f"error: {len(failed)} of {len(paths)} images have no result: {', '.join(map(str, failed))}")
    return not failed


def find_images(words: Sequence[str]) -> list[Path]:
    """Image files of the words of the command line, in order, each once.

    A folder gives its images (not those of its subfolders), a pattern the files that match (``**`` goes down). A file
    that does not exist stays in the list: it is reported when its turn comes.

    Raises:
        InputError: no image at all, a folder or pattern without any.
    """
    from tissuehint.data.records import list_images
    from tissuehint.errors import InputError

    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = list_images(path)
        elif not path.exists() and glob.has_magic(word):
            names = glob.glob(word, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            inside = sorted(path for path in map(Path, names) if path.is_file())
        else:
            inside = [path]
        if not inside:
            raise InputError(word, "holds no image" if path.is_dir() else "matches no file", "check the path")
        found += inside
    return list(dict.fromkeys(found))


def check_targets(paths: Sequence[Path], job: Job) -> None:
    """Refuse before any work what would overwrite something silently.

    Raises:
        InputError: two images with the same results, or results in the place of an input.
    """
    from tissuehint.errors import InputError

    writers: dict[str, Path] = {}
    for path in paths:
        # names are compared without case: two that differ in case only are one file on macOS and Windows
        other = writers.setdefault(path.stem.lower(), path)
        if other is not path:
            rule = f"would write the same {job.targets(path)[0].name} as {other}"
            raise InputError(path, rule, "predict them into different folders, or rename one")
    inputs = {path.resolve() for path in paths}
    for path in paths:
        for target in job.targets(path):
            if target.resolve() in inputs:
                raise InputError(path, f"its result {target} would replace an input", "give another --out")


def _predict_all(
    model: TissueModel, paths: Sequence[Path], job: Job, *, quiet: bool
) -> tuple[list[list[str]], list[Path]]:
    """Rows of the area table, and the images that have no result."""
    from tissuehint.cli.output import note
    from tissuehint.failures import line_about

    rows: list[list[str]] = []
    failed: list[Path] = []
    for path in _track(paths, quiet=quiet):
        try:
            image, tissue_map = _map_of(model, path, job)
        except Exception as error:  # one bad image never stops the batch
            note(f"error: {line_about(error, path)}")
            failed.append(path)
            continue
        mask = model.classes(tissue_map)
        _write(path, image, mask, tissue_map, model.labels, job)
        rows += area_rows(str(path), mask, model.labels, model.um_per_px if job.um_per_px is None else job.um_per_px)
    return rows, failed


def _map_of(model: TissueModel, path: Path, job: Job) -> tuple[NDArray[Any], Tensor]:
    from tissuehint.cli.models import map_of
    from tissuehint.data.records import read_image

    image = read_image(path)
    return image, map_of(model, image, job.um_per_px, job.batch_size)


def area_rows(image: str, mask: NDArray[Any], labels: LabelSpace, um_per_px: float | None) -> list[list[str]]:
    """Rows of ``areas.csv`` for an image: class, pixels, per cent of the tissue (white is no tissue), square mm."""
    import numpy as np

    counts = np.bincount(mask.reshape(-1), minlength=labels.num_classes)[: labels.num_classes]
    tissue = int(counts[: labels.num_tissue].sum())
    rows = []
    for index, (name, count) in enumerate(zip(labels.names, counts.tolist(), strict=True)):
        share = f"{100 * count / tissue:.4f}" if tissue and index < labels.num_tissue else ""
        area = "" if um_per_px is None else f"{count * um_per_px**2 / 1e6:.6g}"
        rows.append([image, name, str(count), share, area])
    return rows


def overlaid(image: NDArray[Any], mask: NDArray[Any], labels: LabelSpace) -> NDArray[Any]:
    """(H,W,3) uint8: the image with the classes' colours laid over its tissue; white stays as it is."""
    import numpy as np

    colours = labels.colour_table()[mask].astype(np.float32)
    mixed = (1 - OVERLAY_OPACITY) * image + OVERLAY_OPACITY * colours
    tissue = (mask < labels.num_tissue)[..., None]
    return np.where(tissue, (mixed + 0.5).astype(np.uint8), image)


def _write(
    path: Path, image: NDArray[Any], mask: NDArray[Any], tissue_map: Tensor, labels: LabelSpace, job: Job
) -> None:
    """All files of an image, each whole or absent; the mask last, so that where it is, the others are."""
    import numpy as np
    from PIL import Image

    from tissuehint.files import atomic_path, write_palette_png

    target, *others = job.targets(path)
    for other in others:
        with atomic_path(other) as part:
            if other.suffix == ".npz":
                probabilities = tissue_map.numpy().astype(np.float16)
                np.savez_compressed(part, probabilities=probabilities, classes=np.array(labels.names))
            else:
                picture = Image.fromarray(overlaid(image, mask, labels))
                picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
                picture.save(part, format="JPEG", quality=90)
    write_palette_png(target, mask, labels.palette())


def _write_areas(path: Path, rows: Iterable[Sequence[str]]) -> None:
    from tissuehint.files import write_text

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([AREA_COLUMNS, *rows])
    write_text(path, text.getvalue())


def _track(paths: Sequence[Path], *, quiet: bool) -> Iterator[Path]:
    if quiet:
        yield from paths
        return
    from rich.console import Console
    from rich.progress import track

    # on stderr, so that messages about bad images and the bar share one place
    yield from track(paths, description="predict", console=Console(stderr=True), transient=True)
