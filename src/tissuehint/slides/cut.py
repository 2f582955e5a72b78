"""Training data from slides: patches at a given pixel size, with the hints that QuPath annotations give them."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import shapely.affinity
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rasterio.features import rasterize
from rasterio.transform import Affine
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from tissuehint.data.folder import write_labels_table, write_points_table
from tissuehint.data.folder_layout import CLASSES, IMAGES, LABELS, MASKS, NOTES, POINTS
from tissuehint.data.patches import windows
from tissuehint.data.qupath import Annotation, read_annotations
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError
from tissuehint.files import atomic_path, write_json, write_palette_png, write_text
from tissuehint.labels import IGNORE, LabelSpace, Points, Proportions, Tags
from tissuehint.slides.coordinates import Box, Origin
from tissuehint.slides.predict import SlideJob
from tissuehint.slides.reader import Slide, open_slide
from tissuehint.slides.tissue import Tissue, TissueConfig, find_tissue

POINT_KINDS, REGION_KINDS = ("Point", "MultiPoint"), ("Polygon", "MultiPolygon", "GeometryCollection")


class CutConfig(BaseModel):
    """Which patches are cut, and what they know.

    Args:
        um_per_px: of the patches.
        side: of a patch, px.
        stride: between patches, px; None takes ``side``.
        tissue: least share of a patch that is tissue.
        presence: a class is tagged if it covers more than this share of what is annotated in a patch.
        annotated: least share of the tissue of a patch that regions must cover for tags and proportions: where less is
            known, a class that is not drawn may still be there.
        hints: which of them to write.
        masks: write masks of the regions too, for scoring.
        unlabelled: keep patches without any hint.
        origin: what the annotations measure from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    um_per_px: float = Field(gt=0)
    side: int = Field(default=224, ge=16)
    stride: int | None = Field(default=None, ge=1)
    tissue: float = Field(default=0.5, ge=0, le=1)
    presence: float = Field(default=0.05, ge=0, lt=1)
    annotated: float = Field(default=0.9, gt=0, le=1)
    hints: tuple[str, ...] = ("tags", "proportions", "points")
    masks: bool = False
    unlabelled: bool = False
    origin: Origin = "bounds"

    @model_validator(mode="after")
    def _known_hints(self) -> CutConfig:
        unknown = set(self.hints) - {"tags", "proportions", "points"}
        if unknown:
            raise ValueError(f"hints {', '.join(sorted(unknown))} are none of tags, proportions, points")
        return self


@dataclass(frozen=True)
class Drawing:
    """Annotations of a slide, in level-0 pixels of the slide.

    Args:
        regions: (polygon with x to the right and y down, class index), in the order in which they were drawn: later
            ones lie above.
        points: (P,3) float rows of (row, column, class).
        left_out: names of the classes that are not used, each with the number of its annotations; ``no class`` too.

    Regions of these have the class ``IGNORE``: what they cover is not known, whatever was drawn below them.
    """

    regions: tuple[tuple[BaseGeometry, int], ...] = ()
    points: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    left_out: tuple[tuple[str, int], ...] = ()


def class_names(files: Sequence[Path]) -> tuple[str, ...]:
    """Classes of the annotations of all files, in the order in which they are met; none where there is none.

    Raises:
        InputError: a file that is no GeoJSON.
    """
    names = [annotation.label for file in files for annotation in read_annotations(file)]
    return tuple(dict.fromkeys(name for name in names if name))


def read_drawing(file: Path, labels: LabelSpace, corner: tuple[float, float]) -> Drawing:
    """Regions and points of a QuPath export.

    Annotations without a class are left out, and lines. So are points of a class that is not in ``labels``; regions of
    it cover what was drawn before them, with nothing that is known.

    Args:
        file: GeoJSON.
        labels: the classes to keep.
        corner: (top, left) that the file measures from, in level-0 pixels of the slide.

    Raises:
        InputError: no GeoJSON, coordinates that are none.
    """
    regions, points, left_out = [], [], Counter[str]()
    for annotation in read_annotations(file):
        kind = annotation.geometry["type"]
        known = annotation.label in labels.names
        if not known:
            left_out[annotation.label or "no class"] += 1
        label = labels.names.index(annotation.label) if known and annotation.label else IGNORE
        if kind in POINT_KINDS and known:
            geometry = _geometry(file, annotation, corner)
            points += [(y, x, label) for x, y in shapely.get_coordinates(geometry).tolist()]
        elif kind in REGION_KINDS and annotation.label:
            regions.append((_geometry(file, annotation, corner), label))
    rows = np.asarray(points, np.float64).reshape(-1, 3)
    return Drawing(tuple(regions), rows, tuple(left_out.items()))


def _geometry(file: Path, annotation: Annotation, corner: tuple[float, float]) -> BaseGeometry:
    try:
        found = shape(annotation.geometry)
        ok = bool(np.isfinite(shapely.get_coordinates(found)).all()) and not found.is_empty
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, shapely.errors.ShapelyError):
        ok = False
    if not ok:
        rule = f"{annotation.place} has coordinates that are none"
        raise InputError(file, rule, "export annotations as GeoJSON from QuPath")
    return shapely.affinity.translate(shapely.make_valid(found), corner[1], corner[0])


@dataclass(frozen=True)
class CutJob:
    """One slide to cut, and its annotations (None: patches without hints)."""

    slide: SlideJob
    annotations: Path | None = None


def cut_slide(
    job: CutJob,
    labels: LabelSpace,
    config: CutConfig,
    folder: Path,
    *,
    tissue_config: TissueConfig,
    told: Callable[[str], None] | None = None,
) -> list[Record]:
    """Cut the patches of one slide into ``folder/images``; what they know is in the records.

    Nothing of a slide that fails is left in ``folder``.

    Args:
        job: the slide.
        labels: classes.
        config: which patches.
        folder: a data folder in the making.
        tissue_config: how tissue is found.
        told: is told which annotations are not used.

    Returns:
        Records with ids ``<slide>/r<row>_c<column>`` of level 0 (with decimals where patches are finer than that), in
        reading order.

    Raises:
        InputError: as the reader of slides and the reader of annotations say.
    """
    try:
        return _cut_slide(job, labels, config, folder, tissue_config, told)
    except BaseException:
        for kind in (IMAGES, MASKS):
            shutil.rmtree(folder / kind / job.slide.path.stem, ignore_errors=True)
        raise


def _cut_slide(
    job: CutJob,
    labels: LabelSpace,
    config: CutConfig,
    folder: Path,
    tissue_config: TissueConfig,
    told: Callable[[str], None] | None,
) -> list[Record]:
    one = job.slide
    opened = open_slide(one.path, um_per_px=one.um_per_px, default_um_per_px=one.default_um_per_px)
    with opened as slide, ThreadPoolExecutor(4) as pool:
        outline, origin = job.slide.outline, config.origin
        tissue = (
            find_tissue(slide, tissue_config)
            if outline is None
            else Tissue.from_geojson(outline, slide, tissue_config, origin)
        )
        drawing = Drawing()
        if job.annotations is not None:
            drawing = read_drawing(job.annotations, labels, slide.corner(origin))
            if drawing.left_out and told is not None:
                names = ", ".join(f"{count} of {name}" for name, count in drawing.left_out)
                told(f"{job.annotations}: annotations that are not used: {names}")
        cutter = _Cutter(slide, tissue, drawing, labels, config, folder)
        return [record for record in pool.map(cutter.cut, cutter.boxes()) if record is not None]


class _Cutter:
    """Makes the patches of a slide."""

    def __init__(
        self, slide: Slide, tissue: Tissue, drawing: Drawing, labels: LabelSpace, config: CutConfig, folder: Path
    ) -> None:
        self.slide, self.tissue, self.drawing = slide, tissue, drawing
        self.labels, self.config, self.folder = labels, config, folder
        self.placement = slide.placement(config.um_per_px)
        self.scale, self.um_per_px = self.placement.scale, self.placement.um_per_px
        self.tree = shapely.STRtree([region for region, _ in drawing.regions])

    def boxes(self) -> Iterator[Box]:
        """Of the patches with enough tissue that lie inside the bounds, row by row."""
        side, bounds = self.config.side, self.slide.bounds
        height, width = int(bounds.height / self.scale), int(bounds.width / self.scale)
        if min(height, width) < side:
            return
        for top, left in windows(height, width, side, self.config.stride or side).tolist():
            box = self.placement.box(top, left, side, side)
            if self.tissue.share(box) >= self.config.tissue:
                yield box

    def cut(self, box: Box) -> Record | None:
        """A patch; None where it has no hint and none without hints are wanted."""
        mask = self._mask(box)
        hints = self._hints(box, mask)
        if not hints and not self.config.unlabelled:
            return None
        name = f"{self.slide.name}/r{self._place(box.top)}_c{self._place(box.left)}"
        target = self.folder / IMAGES / f"{name}.png"
        with atomic_path(target) as part:
            Image.fromarray(self.slide.read(box, self.um_per_px)).save(part, format="PNG")
        if self.config.masks and mask is not None:
            write_palette_png(self.folder / MASKS / f"{name}.png", mask, self.labels.palette())
        return Record(name, target, group=self.slide.name, um_per_px=round(self.um_per_px, 6), **hints)

    def _place(self, value: float) -> str:
        """Level-0 pixels; hundredths of them where patches may begin at less than a pixel from each other."""
        return f"{value:.2f}".rstrip("0").rstrip(".") if self.scale < 1 else str(math.floor(value + 0.5))

    def _mask(self, box: Box) -> NDArray[np.uint8] | None:
        """(side,side) class indices of the regions, 255 elsewhere: a pixel belongs to the region of its centre."""
        around = shapely.box(box.left, box.top, box.right, box.bottom)
        near = sorted(self.tree.query(around).tolist())
        if not near:
            return None
        regions = [self.drawing.regions[index] for index in near]
        side = self.config.side
        transform = (self.scale, 0.0, box.left, 0.0, self.scale, box.top)
        mask = rasterize(regions, out_shape=(side, side), fill=IGNORE, transform=Affine(*transform), dtype="uint8")
        return np.asarray(mask, np.uint8)

    def _hints(self, box: Box, mask: NDArray[np.uint8] | None) -> dict[str, Any]:
        config, labels = self.config, self.labels
        found: dict[str, Any] = {}
        rows = self._points(box)
        if "points" in config.hints and len(rows):
            found["points"] = Points(rows)
        if mask is None:
            return found
        # regions are drawn generously; what they cover of the glass says nothing, unless all of a patch is glass
        tissue = self._on_tissue(box)
        known = mask[tissue] if tissue.any() else mask.reshape(-1)
        counts = np.bincount(known, minlength=256)[: labels.num_tissue]
        covered = int((known != IGNORE).sum())
        if counts.sum() == 0 or covered < config.annotated * known.size:
            return found
        shares = counts / counts.sum()
        if "tags" in config.hints:
            found["tags"] = Tags((shares > config.presence).astype(np.uint8))
        if "proportions" in config.hints:
            found["proportions"] = Proportions(shares)
        return found

    def _on_tissue(self, box: Box) -> NDArray[np.bool_]:
        """(side,side): which pixels have their centre on tissue."""
        centres = (np.arange(self.config.side, dtype=np.float64) + 0.5) * self.scale
        return self.tissue.at(box.top + centres, box.left + centres)

    def _points(self, box: Box) -> NDArray[np.int64]:
        """(P,3) pixels of the patch; of several points in one pixel, the one nearest to its centre counts."""
        rows = self.drawing.points
        inside = (rows[:, 0] >= box.top) & (rows[:, 0] < box.bottom)
        inside &= (rows[:, 1] >= box.left) & (rows[:, 1] < box.right)
        chosen = rows[inside]
        exact = (chosen[:, :2] - (box.top, box.left)) / self.scale
        places = np.floor(exact).astype(np.int64).clip(0, self.config.side - 1)
        order = np.argsort(np.abs(exact - places - 0.5).max(1, initial=0), kind="stable")
        found = np.column_stack([places, chosen[:, 2].astype(np.int64)])[order]
        _, first = np.unique(found[:, :2], axis=0, return_index=True)
        return found[first]


def write_cut(
    folder: Path, records: Sequence[Record], labels: LabelSpace, split: str, notes: Sequence[str] = ()
) -> None:
    """Tables of a data folder whose images are written; ``labels.csv`` comes last."""
    dataset = TissueDataset(folder.name, labels, {split: tuple(records)}, tuple(notes))
    write_json(folder / CLASSES, labels.to_dict())
    if notes:
        write_text(folder / NOTES, "".join(f"{note}\n" for note in notes))
    if any(record.points is not None for record in records):
        write_points_table(folder / POINTS, dataset)
    write_labels_table(folder / LABELS, dataset)
