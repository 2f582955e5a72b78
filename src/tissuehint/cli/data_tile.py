"""``tissuehint data tile``: patches of slides as a data folder, with the hints of QuPath annotations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tissuehint.data.records import Record
    from tissuehint.labels import LabelSpace
    from tissuehint.slides.cut import CutConfig, CutJob
    from tissuehint.slides.predict import SlideJob
    from tissuehint.slides.tissue import TissueConfig

ANNOTATION_SUFFIXES = (".geojson", ".geojson.gz", ".json")


def tile(
    slides: Annotated[list[str], typer.Argument(metavar="SLIDE...", help="Slides, folders, patterns, CSV tables.")],
    out: Annotated[Path, typer.Option(help="New data folder.")],
    um_per_px: Annotated[float, typer.Option(help="Pixel size of the patches in micrometres.")],
    side: Annotated[int, typer.Option(min=16, help="Side of a patch, px.")] = 224,
    stride: Annotated[int | None, typer.Option(min=1, help="Step between patches, px; default: side.")] = None,
    min_tissue: Annotated[float, typer.Option(min=0, max=1, help="Least share of a patch that is tissue.")] = 0.5,
    annotations: Annotated[
        Path | None,
        typer.Option(help="Folder of QuPath exports named like their slides (NAME.geojson), or the file of one slide."),
    ] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Classes, in order; default: those of the annotations.")
    ] = None,
    hints: Annotated[str, typer.Option(metavar="A,B,...", help="Which hints to write.")] = "tags,proportions,points",
    presence: Annotated[float, typer.Option(help="A class is tagged above this share of what is annotated.")] = 0.05,
    annotated: Annotated[
        float, typer.Option(help="Least share of a patch's tissue that regions cover, for tags and proportions.")
    ] = 0.9,
    masks: Annotated[bool, typer.Option("--masks", help="Write masks of the regions too, for scoring.")] = False,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Keep patches without hints.")] = False,
    split: Annotated[str, typer.Option(help="Split of all patches: train, val or test.")] = "train",
    origin: Annotated[str, typer.Option(help="What annotations measure from: bounds (QuPath) or slide.")] = "bounds",
    mpp: Annotated[float | None, typer.Option(help="um per px of slides that do not state theirs.")] = None,
    tissue: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A threshold of the tissue mask. Repeatable.")
    ] = None,
) -> None:
    """Cut slides into patches for training.

    Writes a data folder (docs/how-to/own-data.md) with patches that lie on tissue. QuPath annotations are carried over:
    regions become tags and proportions of the patches that they cover, points stay points. A slide that cannot be read
    is reported, the others go on, and the exit code is 2.
    """
    from tissuehint.cli.data import write_whole
    from tissuehint.cli.output import note, say
    from tissuehint.cli.predict_slides import tissue_config
    from tissuehint.errors import InputError
    from tissuehint.slides.cohort import find_slides
    from tissuehint.slides.cut import CutConfig

    if split not in ("train", "val", "test"):
        raise InputError(f"--split {split}", "is none of train, val, test", "give one of these")
    slide_jobs = find_slides(slides, out, um_per_px=mpp)
    jobs = [_with_annotations(job, annotations, len(slide_jobs)) for job in slide_jobs]
    if annotations is not None and all(job.annotations is None for job in jobs):
        rule = f"has no export for any of {len(jobs)} slides, such as {jobs[0].slide.path.stem}.geojson"
        raise InputError(f"--annotations {annotations}", rule, "name the exports like their slides")
    count, failed = len(jobs), list[str]()
    labels, jobs = _labels(classes, jobs, failed)
    config = CutConfig(
        um_per_px=um_per_px,
        side=side,
        stride=stride,
        tissue=min_tissue,
        presence=presence,
        annotated=annotated,
        hints=tuple(word.strip() for word in hints.split(",") if word.strip()),
        masks=masks,
        unlabelled=unlabelled or annotations is None,
        origin=origin,
    )
    found: list[Record] = []

    def write(part: Path) -> None:
        from tissuehint.slides.cut import write_cut

        found.extend(_cut(jobs, labels, config, part, tissue_config(tissue or []), failed))
        if not found:
            rule = "give no patch" if not failed else f"give no patch ({failed[0]})"
            raise InputError(f"{count} slides", rule, "lower --min-tissue or --annotated, or use --unlabelled")
        write_cut(part, found, labels, split)

    write_whole(out, write)
    say(f"{out}: {len(found)} patches of {side} px at {um_per_px:g} um from {count - len(failed)} slides")
    say(f"check: tissuehint data check {out}")
    if failed:
        note(f"error: {len(failed)} of {count} slides were left out:")
        for line in failed:
            note(f"  {line}")
        raise typer.Exit(2)


def _with_annotations(job: SlideJob, annotations: Path | None, slides: int) -> CutJob:
    from tissuehint.errors import InputError
    from tissuehint.slides.cut import CutJob

    if annotations is None:
        return CutJob(job)
    if annotations.is_file():
        if slides > 1:
            rule = f"is the drawing of one slide, there are {slides}"
            raise InputError(f"--annotations {annotations}", rule, "give a folder of exports named like their slides")
        return CutJob(job, annotations)
    if not annotations.is_dir():
        raise InputError(f"--annotations {annotations}", "does not exist", "check the path")
    for suffix in ANNOTATION_SUFFIXES:
        file = annotations / f"{job.path.stem}{suffix}"
        if file.is_file():
            return CutJob(job, file)
    return CutJob(job)


def _labels(classes: str | None, jobs: list[CutJob], failed: list[str]) -> tuple[LabelSpace, list[CutJob]]:
    """Classes, and the slides whose annotations can be read; the others are told and listed."""
    from tissuehint.cli.output import note
    from tissuehint.errors import InputError
    from tissuehint.labels import LabelSpace
    from tissuehint.slides.cut import class_names

    if classes is not None:
        return LabelSpace(tuple(word.strip() for word in classes.split(","))), jobs
    kept: list[CutJob] = []
    names: dict[str, None] = {}
    for job in jobs:
        try:
            names |= dict.fromkeys(class_names([job.annotations] if job.annotations is not None else []))
        except InputError as error:
            note(f"error: {error}")
            failed.append(str(error))
            continue
        kept.append(job)
    drawn = [job for job in jobs if job.annotations is not None]
    if drawn and not names:
        rule = f"have no annotation with a class ({failed[0]})" if failed else "have no annotation with a class"
        raise InputError(", ".join(str(job.annotations) for job in drawn[:3]), rule, "set classes in QuPath")
    return LabelSpace(tuple(names) or ("tissue",)), kept


def _cut(
    jobs: list[CutJob],
    labels: LabelSpace,
    config: CutConfig,
    folder: Path,
    tissue: TissueConfig,
    failed: list[str],
) -> list[Record]:
    """Patches of all slides that can be read; the others are told and listed."""
    from tissuehint.cli.output import note
    from tissuehint.failures import line_about
    from tissuehint.slides.cut import cut_slide

    found: list[Any] = []
    for job in jobs:
        try:
            records = cut_slide(job, labels, config, folder, tissue_config=tissue, told=note)
        except Exception as error:  # one bad slide never stops the batch
            line = line_about(error, job.slide.path)
            note(f"error: {line}")
            failed.append(line)
            continue
        note(f"{job.slide.path}: {len(records)} patches")
        found += records
    return found
