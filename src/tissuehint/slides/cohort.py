"""Many slides: which ones, one after the other, a bad one never stopping the others."""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tissuehint.errors import InputError
from tissuehint.failures import line_about
from tissuehint.files import finite, write_json, write_text
from tissuehint.model import TissueModel
from tissuehint.slides.predict import Progress, SlideConfig, SlideJob, predict_slide
from tissuehint.slides.state import STATE_FILE, SlideState

COHORT_FILE, TABLE_FILE = "cohort.json", "cohort.csv"

#: Files that are slides by their name; other TIFFs are slides where OpenSlide knows their format.
SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi", ".dcm", ".qptiff")
TIFF = (".tif", ".tiff")

TABLE_COLUMNS = ("slide", "mpp", "outline")


@dataclass(frozen=True)
class Outcome:
    """How one slide ended.

    Args:
        job: the slide.
        state: its record; None where it has none.
        error: one line; None where it is done.
        skipped: it was finished before.
    """

    job: SlideJob
    state: SlideState | None
    error: str | None = None
    skipped: bool = False


class Engine(Protocol):
    """Runs jobs, in this process or elsewhere."""

    def __call__(self, jobs: Sequence[SlideJob]) -> Iterator[Outcome]:
        """Outcomes as they come."""


# ---- which slides ---------------------------------------------------------------------------------------------------


def is_slide(path: Path) -> bool:
    """Whether a file is read as a slide: by its suffix, a TIFF by what OpenSlide says of it."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix not in TIFF or not path.is_file():
        return False
    import openslide

    try:
        return openslide.OpenSlide.detect_format(str(path)) is not None
    except openslide.OpenSlideError:
        return True  # it is one, and a damaged one


def files_of(word: str) -> list[Path] | None:
    """Files of a folder (not of its subfolders) or of a pattern, sorted; None for what is neither.

    Raises:
        InputError: a pattern that matches no file.
    """
    path = Path(word)
    if path.is_dir():
        # hidden files are the doubles that macOS writes beside others
        return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    if path.exists() or not glob.has_magic(word):
        return None
    names = glob.glob(word, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    found = sorted(file for file in map(Path, names) if file.is_file())
    if not found:
        raise InputError(word, "matches no file", "check the path")
    return found


def find_slides(words: Sequence[str], out: Path, *, um_per_px: float | None = None) -> list[SlideJob]:
    """Slides of the words of the command line, in order, each once.

    Args:
        words: files; folders (their slides, not those of subfolders); patterns like ``scans/**/*.svs``; CSV tables with
            the columns slide (a path, relative to the table), and where known mpp (um per px of level 0) and outline
            (GeoJSON of its tissue).
        out: each slide gets the folder ``out/<name of the slide>``.
        um_per_px: of slides that say none themselves, and for which the table says none.

    Raises:
        InputError: a folder, pattern or table without slides, a bad table, two slides of the same name, two tables
            that say different things of a slide.
    """
    jobs: list[SlideJob] = []
    for word in words:
        path = Path(word)
        if path.suffix.lower() == ".csv":
            jobs += _table(path)
            continue
        files = files_of(word)
        slides = [path] if files is None else [file for file in files if is_slide(file)]
        if not slides:
            rule = "holds no slide" if path.is_dir() else "matches no slide"
            raise InputError(word, rule, f"give slides ({', '.join(SUFFIXES[:4])}, tiled TIFF, ...)")
        jobs += [SlideJob(file, Path()) for file in slides]
    chosen: dict[str, SlideJob] = {}
    for job in jobs:
        name = job.path.stem
        other = chosen.get(name.lower())  # names that differ in case only are one folder on macOS and Windows
        if other is not None and other.path.resolve() != job.path.resolve():
            rule = f"would write the same folder {out / name} as {other.path}"
            raise InputError(job.path, rule, "predict them into different --out folders, or rename one")
        if other is None:
            chosen[name.lower()] = replace(job, folder=out / name, default_um_per_px=um_per_px)
        else:
            chosen[name.lower()] = _both(other, job)
    return list(chosen.values())


def _both(one: SlideJob, other: SlideJob) -> SlideJob:
    """A slide that was named twice, by its folder and by a table, say."""
    for what, here, there in (("mpp", one.um_per_px, other.um_per_px), ("outline", one.outline, other.outline)):
        if here is not None and there is not None and here != there:
            raise InputError(one.path, f"has two values of {what} ({here}, {there})", "name it once, or with one value")
    return replace(one, um_per_px=one.um_per_px or other.um_per_px, outline=one.outline or other.outline)


def _table(path: Path) -> list[SlideJob]:
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    except UnicodeDecodeError:
        raise InputError(path, "is no UTF-8 text", "save the table as CSV UTF-8") from None
    if not rows or "slide" not in rows[0]:
        rule = "has no column slide" if rows else "has no rows"
        raise InputError(path, rule, "write a CSV table with the columns slide, mpp (optional) and outline (optional)")
    jobs = []
    for number, row in enumerate(rows, 2):
        place = f"{path}:{number}"
        slide, outline = (row.get("slide") or "").strip(), (row.get("outline") or "").strip()
        if not slide:
            raise InputError(place, "names no slide", "fill the column slide, or delete the row")
        size = _size(place, (row.get("mpp") or "").strip())
        jobs.append(SlideJob(path.parent / slide, Path(), size, path.parent / outline if outline else None))
    return jobs


def _size(place: str, word: str) -> float | None:
    if not word:
        return None
    try:
        value = float(word)
    except ValueError:
        value = float("nan")
    if not 0.01 <= value <= 100:
        raise InputError(place, f"has mpp '{word}', micrometres per pixel are 0.01..100", "write 0.5 for a 20x scan")
    return value


# ---- one after the other --------------------------------------------------------------------------------------------


class LocalEngine:
    """This process.

    Args:
        model: on its device.
        model_facts: which one.
        config: of all slides.
        batch_size: windows at a time; None takes what fits their size.
        readers: threads that read ahead.
        progress: for a slide, what is told of its windows.
    """

    def __init__(
        self,
        model: TissueModel,
        model_facts: dict[str, Any],
        config: SlideConfig,
        *,
        batch_size: int | None = None,
        readers: int | None = None,
        progress: Callable[[SlideJob], Progress] | None = None,
    ) -> None:
        self.model, self.model_facts, self.config = model, model_facts, config
        self.batch_size, self.readers, self.progress = batch_size, readers, progress

    def __call__(self, jobs: Sequence[SlideJob]) -> Iterator[Outcome]:
        """Slide after slide."""
        for job in jobs:
            yield self.one(job)

    def one(self, job: SlideJob) -> Outcome:
        """A slide; whatever is wrong with it ends in its outcome."""
        attempts = _attempts(job.folder)
        try:
            state = predict_slide(
                self.model,
                self.model_facts,
                job,
                self.config,
                batch_size=self.batch_size,
                readers=self.readers,
                progress=None if self.progress is None else self.progress(job),
            )
        except Exception as error:  # one bad slide never stops the batch
            return Outcome(job, None, line_about(error, job.path))
        return Outcome(job, state, skipped=state.attempts == attempts)


def predict_cohort(
    engine: Engine, jobs: Sequence[SlideJob], out: Path, *, told: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Predict slides and keep the table of all of them up to date.

    Args:
        engine: what runs them.
        jobs: the slides.
        out: folder of the cohort; ``cohort.csv`` has a row for each slide that was ever begun there.
        told: is told of each slide as it ends.

    Returns:
        Outcomes in the order in which they came.
    """
    outcomes = []
    for outcome in engine(jobs):
        outcomes.append(outcome)
        write_table(out)
        if told is not None:
            told(outcome)
    return outcomes


def enter_cohort(out: Path, model_facts: dict[str, Any], config: SlideConfig) -> None:
    """Make the folder of a cohort, or enter one of the same model and settings.

    Raises:
        InputError: results of another model or other settings lie there.
    """
    wanted = finite({"model": model_facts["sha256"], **config.model_dump(mode="json")})
    file = out / COHORT_FILE
    if file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(file, "is damaged", "give another --out folder") from None
        for key in wanted:
            if before.get(key) != wanted[key]:
                what = "another model" if key == "model" else f"other settings of {key}"
                rule = f"holds results of {what}"
                raise InputError(out, rule, "give another --out folder, or repeat the settings")
    else:
        write_json(file, wanted)


def write_table(out: Path) -> Path:
    """``cohort.csv``: slide, state, error, attempts, seconds, tissue, and for each class its area and share."""
    states = read_states(out)
    classes = list(dict.fromkeys(row["class"] for state in states for row in state.areas))
    heads = ["slide", "state", "error", "attempts", "seconds", "um_per_px", "tissue_mm2"]
    heads += [f"{name} {unit}" for name in classes for unit in ("mm2", "percent")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for state in states:
        areas = {row["class"]: row for row in state.areas}
        cells: list[Any] = [state.name, state.state, state.error, state.attempts, state.seconds]
        cells += [state.slide.get("um_per_px"), state.tissue_mm2]
        for name in classes:
            row = areas.get(name, {})
            cells += [row.get("mm2"), row.get("percent_of_tissue")]
        writer.writerow(["" if cell is None else cell for cell in cells])
    target = out / TABLE_FILE
    write_text(target, text.getvalue())
    return target


def read_states(out: Path) -> list[SlideState]:
    """Records of all slides of a cohort, by name; a damaged one counts as failed."""
    states = []
    for file in sorted(out.glob(f"*/{STATE_FILE}")):
        try:
            state = SlideState.read(file.parent)
        except InputError as error:
            state = SlideState(file.parent.name, state="failed", error=str(error))
        if state is not None:
            states.append(state)
    return states


def _attempts(folder: Path) -> int:
    try:
        state = SlideState.read(folder)
    except InputError:
        return 0
    return 0 if state is None or state.state != "done" else state.attempts


def failed(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that have no result."""
    return [outcome for outcome in outcomes if outcome.error is not None]
