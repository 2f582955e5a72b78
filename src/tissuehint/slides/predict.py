"""One slide, from its file to the folder of its results."""

from __future__ import annotations

import errno
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from tissuehint.errors import InputError
from tissuehint.failures import line_about
from tissuehint.files import atomic_path, finite, write_json
from tissuehint.model import TissueModel
from tissuehint.slides.coordinates import Origin
from tissuehint.slides.export.areas import AreaRow, area_rows, write_areas
from tissuehint.slides.export.class_map import ClassMap
from tissuehint.slides.export.geojson import write_geojson
from tissuehint.slides.export.ome_tiff import write_ome_tiff
from tissuehint.slides.export.overlay import write_overlay
from tissuehint.slides.export.polygons import tissue_polygons
from tissuehint.slides.mapping import PROBABILITIES, Mapper, MappingConfig, Plan, plan_map
from tissuehint.slides.memory import one_heap, release_memory
from tissuehint.slides.reader import Slide, open_slide
from tissuehint.slides.state import SlideState, file_hash, slide_facts, versions
from tissuehint.slides.tiles import Tiling
from tissuehint.slides.tissue import Tissue, TissueConfig, find_tissue

WORK, LOCK = ".work", ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # some network file systems
PLAN_FILE = "plan.json"
THUMBNAIL_SIDE, SMALLER = 2048, 0.75  # px; share of it down to which a level of the slide serves as it is

CLASSES_FILE, POLYGONS_FILE, AREAS_FILE = "classes.ome.tif", "tissue.geojson.gz", "areas.csv"
THUMBNAIL_FILE, OVERLAY_FILE, OUTLINE_FILE = "thumbnail.jpg", "overlay.jpg", "tissue_mask.geojson"

#: Windows done, windows in all.
Progress = Callable[[int, int], None]


class PolygonConfig(BaseModel):
    """How the class map becomes polygons.

    Args:
        tolerance: how far a simplified border may lie from the true one, px of the map; 0 keeps every corner.
        min_area: smaller polygons are left out, px of the map.
        origin: what coordinates are measured from: QuPath measures from the bounds of a slide.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tolerance: float = Field(default=1.5, ge=0)
    min_area: float = Field(default=16, ge=0)
    origin: Origin = "bounds"


class SlideConfig(BaseModel):
    """What decides the result of a slide.

    Args:
        mapping: how the model sees it.
        tissue: how tissue is found.
        polygons: how borders are simplified.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mapping: MappingConfig = MappingConfig()
    tissue: TissueConfig = TissueConfig()
    polygons: PolygonConfig = PolygonConfig()


@dataclass(frozen=True)
class SlideJob:
    """One slide and where its results go.

    Args:
        path: of the slide.
        folder: of its results.
        um_per_px: of its level 0; None takes what the file says.
        outline: GeoJSON of its tissue; None finds it.
        default_um_per_px: of its level 0, where the file says none and ``um_per_px`` is None.
    """

    path: Path
    folder: Path
    um_per_px: float | None = None
    outline: Path | None = None
    default_um_per_px: float | None = None


def predict_slide(
    model: TissueModel,
    model_facts: dict[str, Any],
    job: SlideJob,
    config: SlideConfig,
    *,
    batch_size: int | None = None,
    readers: int | None = None,
    progress: Progress | None = None,
) -> SlideState:
    """Map a slide and write everything about it into its folder; a finished one is left as it is.

    A run that was killed goes on with the blocks that it had not done. Files get their names when they are whole, and
    ``slide.json`` says ``done`` when all of them are.

    Args:
        model: on its device, in evaluation mode.
        model_facts: which model it is (``state.model_facts``).
        job: the slide.
        config: what decides the result.
        batch_size: windows at a time; None takes what fits their size.
        readers: threads that read ahead.
        progress: told after each step.

    Returns:
        The state, with ``state`` done.

    Raises:
        InputError: a slide that cannot be read, does not know its pixel size or shows no tissue; OSError: as the file
            system says. Both stand in ``slide.json`` too, where it can be written. InputError, without a record:
            another process is at work in the folder; a damaged record; an outline that cannot be read.

    From the first slide on, threads of this process share a heap (``one_heap``).
    """
    settings = _settings(job, config)

    def finished() -> SlideState | None:
        earlier = SlideState.read(job.folder)
        same = earlier is not None and earlier.state == "done" and _same(earlier, job, model_facts, settings)
        return earlier if same else None

    done = finished()
    if done is not None:
        return done
    with _claimed(job.folder):
        # another process may have finished it just now
        return finished() or _attempt(model, model_facts, job, config, settings, batch_size, readers, progress)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """The folder is that of this process alone; the claim ends with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        fix = "wait until it ends, or end it; then run the same command again"
        raise InputError(folder, "is worked on by another process", fix) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        text = f"{folder}: its file system has no locks; let no second process work on it"
        warnings.warn(text, stacklevel=1)  # the command line shows what comes from tissuehint
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: filelock sees that such a file is gone
        lock.release()


def _attempt(
    model: TissueModel,
    model_facts: dict[str, Any],
    job: SlideJob,
    config: SlideConfig,
    settings: dict[str, Any],
    batch_size: int | None,
    readers: int | None,
    progress: Progress | None,
) -> SlideState:
    earlier = SlideState.read(job.folder)
    if earlier is not None and earlier.outputs:
        # of another slide or other settings: old and new never stand side by side
        earlier.state = "running"
        earlier.write(job.folder)
        _remove(job.folder, earlier.outputs)
    one_heap()
    started = time.monotonic()
    state = SlideState(
        name=job.folder.name,
        attempts=1 + (0 if earlier is None else earlier.attempts),
        slide={"path": str(job.path.absolute())},
        labels=model.labels.to_dict(),
        model=model_facts,
        settings=settings,
        versions=versions(),
    )
    try:
        state.slide = slide_facts(job.path)
        state.write(job.folder)
        with open_slide(job.path, um_per_px=job.um_per_px, default_um_per_px=job.default_um_per_px) as slide:
            if not slide.takes_default:
                settings["default_um_per_px"] = None
            _Prediction(model, slide, job, config, state).run(batch_size, readers, progress)
        if slide_facts(job.path) != {key: state.slide[key] for key in ("path", "bytes", "modified")}:
            raise InputError(job.path, "was changed while it was read", "run the same command again")
    except Exception as error:
        _record_failure(state, error, job.folder, started)
        raise
    state.state, state.seconds = "done", round(time.monotonic() - started, 1)
    state.write(job.folder)
    _leave_work(job.folder / WORK)
    return state


class _Prediction:
    """The steps of one attempt at a slide."""

    def __init__(self, model: TissueModel, slide: Slide, job: SlideJob, config: SlideConfig, state: SlideState) -> None:
        self.model, self.slide, self.job, self.config, self.state = model, slide, job, config, state
        self.folder = job.folder

    def run(self, batch_size: int | None, readers: int | None, progress: Progress | None) -> None:
        slide = self.slide
        self.state.slide |= {
            "sha256": file_hash(self.job.path),
            "reader": slide.reader,
            "height": slide.shape[0],
            "width": slide.shape[1],
            "um_per_px": slide.um_per_px,
            "bounds": [slide.bounds.top, slide.bounds.left, slide.bounds.height, slide.bounds.width],
        }
        thumbnail = slide.thumbnail(_thumbnail_side(slide))
        self._picture(THUMBNAIL_FILE, thumbnail)
        tissue = self._tissue()
        plan = plan_map(self.model, slide, tissue, self.config.mapping)
        tiling, placement = plan.tiling, plan.placement
        self.state.map = {"height": tiling.height, "width": tiling.width, **asdict(placement)}
        self._enter_work(tiling)
        mapper = Mapper(
            self.model,
            slide,
            tissue,
            plan,
            self.folder / WORK,
            probabilities=self.config.mapping.probabilities,
            batch_size=batch_size,
            readers=readers,
        )
        # the map is painted while it is computed; cutting polygons beside the network would take more memory
        with ThreadPoolExecutor(1) as beside:
            classes, growing = mapper.classes, mapper.growing
            try:
                painted = beside.submit(self._pictures, growing, plan, thumbnail)
                mapper.run(_counted(plan, progress, painted))
                del mapper
                release_memory()
                self._polygons(classes, plan)
            finally:
                growing.give_up()
            self._finish(painted.result())

    def _tissue(self) -> Tissue:
        """Found, or as it was drawn; written beside the results, so that it can be looked at and mended."""
        config, slide, outline = self.config.tissue, self.slide, self.job.outline
        origin = self.config.polygons.origin
        tissue = find_tissue(slide, config) if outline is None else Tissue.from_geojson(outline, slide, config, origin)
        if not tissue.mask.any():
            rule = "shows no tissue" if outline is None else f"has no tissue inside {outline}"
            fix = "look at its thumbnail.jpg; change the thresholds (--tissue KEY=VALUE) or draw the tissue (--outline)"
            raise InputError(self.job.path, rule, fix)
        tissue.to_geojson(self.folder / OUTLINE_FILE, origin)
        self.state.tissue_mm2 = tissue.area_mm2
        return tissue

    def _enter_work(self, tiling: Tiling) -> None:
        """A folder for what is not finished; that of an earlier attempt, if it made the same map."""
        work = self.folder / WORK
        for part in self.folder.glob(".*.part.*"):
            part.unlink(missing_ok=True)  # of an attempt that was killed
        wanted = finite({"slide": self.state.slide, "model": self.state.model["sha256"], "map": self.state.map})
        wanted |= finite({"settings": self.state.settings, "tiling": asdict(tiling)})
        wanted |= {"tissuehint": self.state.versions["tissuehint"]}
        try:
            kept = json.loads((work / PLAN_FILE).read_text(encoding="utf-8")) == wanted
        except (OSError, ValueError):
            kept = False
        moved, place = self.folder / PROBABILITIES, work / PROBABILITIES
        if kept and moved.is_dir() and not place.exists():
            moved.replace(place)  # the attempt before was killed after it had moved them
        if not kept:
            _leave_work(work)
            shutil.rmtree(moved, ignore_errors=True)
            work.mkdir(parents=True, exist_ok=True)
            write_json(work / PLAN_FILE, wanted)

    def _pictures(self, classes: ClassMap, plan: Plan, thumbnail: Any) -> list[AreaRow]:
        """The map as an image, its areas, and the thumbnail with its colours."""
        labels, placement, folder = self.model.labels, plan.placement, self.folder
        write_ome_tiff(folder / CLASSES_FILE, classes, labels, placement)
        rows = area_rows(classes, labels, placement.um_per_px)
        write_overlay(folder / OVERLAY_FILE, thumbnail, classes, labels, placement, self.slide.shape, areas=rows)
        return rows

    def _polygons(self, classes: ClassMap, plan: Plan) -> None:
        labels, settings = self.model.labels, self.config.polygons
        shapes = tissue_polygons(classes, labels, tolerance=settings.tolerance, min_area=settings.min_area)
        corner = self.slide.corner(settings.origin)
        write_geojson(self.folder / POLYGONS_FILE, shapes, labels, plan.placement, corner=corner)

    def _finish(self, rows: list[AreaRow]) -> None:
        folder = self.folder
        write_areas(folder / AREAS_FILE, rows)
        self.state.areas = [
            {"class": row.name, "pixels": row.pixels, "mm2": row.mm2, "percent_of_tissue": row.percent} for row in rows
        ]
        outputs = [CLASSES_FILE, POLYGONS_FILE, AREAS_FILE, THUMBNAIL_FILE, OVERLAY_FILE, OUTLINE_FILE]
        if self.config.mapping.probabilities:
            target = folder / PROBABILITIES
            shutil.rmtree(target, ignore_errors=True)
            (folder / WORK / PROBABILITIES).replace(target)
            outputs.append(PROBABILITIES)
        self.state.outputs = outputs

    def _picture(self, name: str, picture: Any) -> None:
        with atomic_path(self.folder / name) as part:
            Image.fromarray(picture).save(part, format="JPEG", quality=90)


def _thumbnail_side(slide: Slide) -> int:
    """That of a level where one is nearly right: to make 2048 px of 2000, four or sixteen times as many are read."""
    sides = [max(level.height, level.width) for level in slide.levels]
    return max((side for side in sides if SMALLER * THUMBNAIL_SIDE <= side <= THUMBNAIL_SIDE), default=THUMBNAIL_SIDE)


def _settings(job: SlideJob, config: SlideConfig) -> dict[str, Any]:
    outline = None if job.outline is None else file_hash(job.outline)
    sizes = {"um_per_px": job.um_per_px, "default_um_per_px": job.default_um_per_px}
    found: dict[str, Any] = finite(config.model_dump(mode="json") | sizes | {"outline": outline})
    return found


def _same(earlier: SlideState, job: SlideJob, model: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a finished slide is still what is asked for; a slide that has gone since does not matter."""
    default = earlier.settings.get("default_um_per_px")
    if default is None or settings["default_um_per_px"] is None:
        # the slide says its own; or none is given now, which takes nothing away from a slide that is finished
        settings = settings | {"default_um_per_px": default}
    if earlier.model.get("sha256") != model["sha256"] or earlier.settings != settings:
        return False
    try:
        now = slide_facts(job.path)
    except OSError:
        return True
    return all(earlier.slide.get(key) == now[key] for key in ("bytes", "modified"))


def _leave_work(work: Path) -> None:
    """Remove what was in the making; first of all what says that it may be gone on with."""
    (work / PLAN_FILE).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _remove(folder: Path, names: list[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _record_failure(state: SlideState, error: Exception, folder: Path, started: float) -> None:
    state.state, state.error, state.outputs = "failed", line_about(error, state.slide["path"]), []
    state.seconds = round(time.monotonic() - started, 1)
    with suppress(OSError):  # a full disk: the message still reaches the user
        state.write(folder)


def _counted(plan: Plan, progress: Progress | None, beside: Future[Any]) -> Callable[[int], None]:
    """Adds up the windows that are done; what went wrong beside them ends them."""
    done, total = 0, plan.windows

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if beside.done():
            beside.result()
        if progress is not None:
            progress(done, total)

    return tell
