"""The part of ``tissuehint predict`` that concerns whole slides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tissuehint.cli.models import Device
from tissuehint.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from tissuehint.slides.cohort import Engine, Outcome
    from tissuehint.slides.predict import Progress, SlideConfig, SlideJob
    from tissuehint.slides.tissue import TissueConfig


@dataclass(frozen=True)
class SlideOptions:
    """Options of the command line, as they are named there."""

    model_mpp: float | None
    window: int | None
    overlap: int | None
    soft: bool
    tissue: tuple[str, ...]
    outline: Path | None
    tolerance: float
    min_area: float
    origin: Literal["slide", "bounds"]
    readers: int | None
    engine: str
    address: str | None
    actors: int | None
    batch_size: int | None
    um_per_px: float | None
    quiet: bool


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words of the command line that mean slides (CSV tables too), and those that mean images.

    Raises:
        InputError: a folder or pattern with neither.
    """
    from tissuehint.data.records import list_images
    from tissuehint.slides.cohort import files_of, is_slide

    slides: list[str] = []
    images: list[str] = []
    for word in words:
        path = Path(word)
        if path.suffix.lower() == ".csv":
            slides.append(word)
            continue
        files = files_of(word)
        if files is None:
            (slides if is_slide(path) else images).append(word)
            continue
        inside = [file for file in files if is_slide(file)]
        others = [file for file in (list_images(path) if path.is_dir() else files) if file not in inside]
        if not inside and not others:
            raise InputError(word, "holds no image and no slide", "check the path")
        slides += map(str, inside)
        images += map(str, others)
    return slides, images


def predict_slides(model: Path, device: Device, words: Sequence[str], out: Path, options: SlideOptions) -> bool:
    """Predict a cohort; whether all slides have a result."""
    from tissuehint.cli.models import load_model
    from tissuehint.cli.output import note, say
    from tissuehint.model import model_folder
    from tissuehint.report import write_summary
    from tissuehint.slides.cohort import LocalEngine, enter_cohort, failed, find_slides, predict_cohort
    from tissuehint.slides.mapping import windows_of
    from tissuehint.slides.state import model_facts

    jobs = _jobs(find_slides(words, out, um_per_px=options.um_per_px), options)
    config = _config(options)
    folder = model_folder(model)
    loaded = load_model(model, device)
    facts = model_facts(folder, loaded.um_per_px)
    windows_of(loaded, config.mapping, name=model)  # said once, before anything is written
    bar = _bar(options.quiet or options.engine == "ray")
    engine: Engine
    if options.engine == "ray":
        engine = _ray_engine(folder, facts, config, options)
    else:
        engine = LocalEngine(
            loaded,
            facts,
            config,
            batch_size=options.batch_size,
            readers=options.readers,
            progress=None if bar is None else _slide_progress(bar),
        )
    enter_cohort(out, facts, config)

    def told(outcome: Outcome) -> None:
        write_summary(out)
        note(_line(outcome)) if outcome.error is not None else say(_line(outcome))

    if bar is None:
        outcomes = predict_cohort(engine, jobs, out, told=told)
    else:
        with bar:
            outcomes = predict_cohort(engine, jobs, out, told=told)
    bad = failed(outcomes)
    done = f"{len(outcomes) - len(bad)} of {len(outcomes)} slides"
    say(f"{done}: {out}, table {out / 'cohort.csv'}, {out / 'summary.html'}")
    say(f"look at them: tissuehint view {out} --slides {jobs[0].path.parent}")
    if bad:
        note(f"error: {len(bad)} of {len(outcomes)} slides have no result:")
        for outcome in bad:
            note(f"  {outcome.error}")
    return not bad


def _jobs(jobs: list[SlideJob], options: SlideOptions) -> list[SlideJob]:
    from dataclasses import replace

    if options.outline is None:
        return jobs
    if len(jobs) != 1:
        rule = f"is for one slide, there are {len(jobs)}"
        raise InputError(f"--outline {options.outline}", rule, "give a CSV table with a column outline")
    if not options.outline.is_file():
        raise InputError(f"--outline {options.outline}", "is no file", "check the path")
    return [replace(jobs[0], outline=options.outline)]


def _config(options: SlideOptions) -> SlideConfig:
    from tissuehint.slides.mapping import MappingConfig
    from tissuehint.slides.predict import PolygonConfig, SlideConfig

    mapping = MappingConfig(
        um_per_px=options.model_mpp, window=options.window, overlap=options.overlap, probabilities=options.soft
    )
    polygons = PolygonConfig(tolerance=options.tolerance, min_area=options.min_area, origin=options.origin)
    return SlideConfig(mapping=mapping, tissue=tissue_config(options.tissue), polygons=polygons)


def tissue_config(words: Sequence[str]) -> TissueConfig:
    """Thresholds from KEY=VALUE words.

    Raises:
        InputError: no such key, or a value that breaks its rule.
    """
    from tissuehint.slides.tissue import TissueConfig

    thresholds: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or key not in TissueConfig.model_fields:
            rule = f"is no KEY=VALUE with a key of {', '.join(TissueConfig.model_fields)}"
            raise InputError(f"--tissue {word}", rule, "give one of these keys")
        thresholds[key] = None if value.lower() in ("none", "null") else value
    return TissueConfig(**thresholds)


def _ray_engine(folder: Path, facts: dict[str, Any], config: SlideConfig, options: SlideOptions) -> Engine:
    from tissuehint.slides.ray_engine import RayEngine

    return RayEngine(
        folder,
        facts,
        config,
        address=options.address,
        actors=options.actors,
        batch_size=options.batch_size,
        readers=options.readers,
    )


def _line(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"error: {outcome.error}"
    assert outcome.state is not None
    state = outcome.state
    if outcome.skipped:
        return f"{state.name}: finished before"
    counted = [row for row in state.areas if row["percent_of_tissue"] is not None]
    shares = ", ".join(f"{row['class']} {row['percent_of_tissue']:.1f} %" for row in counted)
    return f"{state.name}: {state.tissue_mm2:.2f} mm2 of tissue, {shares}, {state.seconds:.0f} s"


def _bar(quiet: bool) -> Bar | None:
    if quiet:
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("windows"),
        TimeRemainingColumn(),
    )
    # on stderr, so that messages about bad slides and the bar share one place
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _slide_progress(bar: Bar) -> Callable[[SlideJob], Progress]:
    def of_slide(job: SlideJob) -> Progress:
        for task in bar.task_ids:
            bar.remove_task(task)
        shown = bar.add_task(job.path.name, total=None)

        def tell(done: int, total: int) -> None:
            bar.update(shown, completed=done, total=total)

        return tell

    return of_slide
