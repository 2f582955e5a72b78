"""The tissue map of a slide: read, compute, stitch; in bounded memory, and going on where a killed run stopped."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import zarr
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from zarr.codecs import ZstdCodec

from tissuehint.data.patches import resize_image
from tissuehint.errors import InputError
from tissuehint.files import write_text
from tissuehint.model import TissueModel
from tissuehint.slides.ahead import ahead
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.memory import PacedRelease
from tissuehint.slides.reader import Slide
from tissuehint.slides.stitch import BlockSum, Waiting
from tissuehint.slides.tiles import Tiling
from tissuehint.slides.tissue import Tissue

#: Least side of a block's core, px: its sums take some tens of MB.
CORE = 1536

#: Windows without a grid in the model.
WINDOW, OVERLAP = 512, 64

#: Pixels that go through the network at a time, on the CPU and on a GPU: 2 and 32 windows of 512 px.
BATCH_PIXELS = {"cpu": 2**19, "cuda": 2**23}

CLASSES, PROBABILITIES, JOURNAL, WAITING = "classes.zarr", "probabilities.zarr", "blocks.txt", "waiting"


class MappingConfig(BaseModel):
    """How a model sees a slide.

    Args:
        um_per_px: pixel size at which the model sees the slide; None takes the model's own.
        window: side of what the network sees at a time, px; None takes that of the model, or else 512.
        overlap: of windows, px; None takes that of the model, or else 64.
        probabilities: keep the probabilities too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    um_per_px: float | None = Field(default=None, gt=0)
    window: int | None = Field(default=None, ge=32)
    overlap: int | None = Field(default=None, ge=0)
    probabilities: bool = False


@dataclass(frozen=True)
class Windows:
    """How a model sees slides, before any slide is opened.

    Args:
        um_per_px: of the map.
        side: of a window in the map, px.
        overlap: of windows, px.
        network_side: side at which the network sees a window, px.
    """

    um_per_px: float
    side: int
    overlap: int
    network_side: int

    def batch_size(self, device: torch.device) -> int:
        """As many windows as make ``BATCH_PIXELS``, one at least: what a network needs grows with its pixels."""
        return max(1, BATCH_PIXELS.get(device.type, BATCH_PIXELS["cpu"]) // self.network_side**2)


def windows_of(model: TissueModel, config: MappingConfig, *, name: object = "model") -> Windows:
    """Windows of a model where the configuration names none; ``name`` is what errors call the model.

    Raises:
        InputError: a model that does not know its pixel size, an overlap that leaves no stride.
    """
    um_per_px = config.um_per_px or model.um_per_px
    if um_per_px is None:
        rule = "does not know at which um per px it was trained"
        raise InputError(name, rule, "give --model-mpp, such as 0.5 for a 20x scan")
    grid, overlap = model.grid, config.overlap
    side = config.window or (WINDOW if grid is None else grid.side)
    if overlap is None:
        overlap = min(OVERLAP, side // 2) if grid is None else min(grid.side - grid.stride, side - 1)
    if overlap >= side:
        raise InputError(f"--overlap {overlap}", f"leaves no step between windows of {side} px", "take less than half")
    network_side = side
    if grid is not None and grid.resize is not None:
        network_side = round(side * grid.resize / grid.side)
    return Windows(um_per_px, side, overlap, network_side)


@dataclass(frozen=True)
class Plan:
    """Where the map of a slide lies, and how it is cut up.

    Args:
        placement: of the map on the slide.
        tiling: windows and blocks.
        seen: how the model sees them.
        wanted: (rows, columns) bool, windows that see tissue.
    """

    placement: Placement
    tiling: Tiling
    seen: Windows
    wanted: NDArray[np.bool_]

    @property
    def windows(self) -> int:
        """How many windows go through the network."""
        return int(self.wanted.sum())


def plan_map(model: TissueModel, slide: Slide, tissue: Tissue, config: MappingConfig) -> Plan:
    """The windows of a slide that a model has to see.

    The map covers the bounds of the slide. Where the pixel size of the slide is within 1 % of what the model sees, the
    slide's own pixels are used.

    Raises:
        InputError: a slide or a model that does not know its pixel size, an overlap that leaves no stride.
    """
    seen = windows_of(model, config)
    placement, bounds = slide.placement(seen.um_per_px), slide.bounds
    scale, side = placement.scale, seen.side
    stride = side - seen.overlap
    tiling = Tiling(
        height=max(1, round(bounds.height / scale)),
        width=max(1, round(bounds.width / scale)),
        side=side,
        stride=stride,
        block=-(-max(CORE, seen.overlap) // stride),
    )
    tops, lefts = tiling.corners()
    rows, columns = placement.to_slide(tops.astype(float), lefts.astype(float))
    length = side * scale
    shares = tissue.shares(rows[:, None], columns[None, :], length, length)
    return Plan(placement, tiling, seen, shares > 0)


class UnfinishedError(RuntimeError):
    """A map was given up before the pixels that somebody waited for were computed."""


class GrowingMap:
    """A class map while it is computed, for other threads: pixels are there when the blocks that they lie in are done.

    Args:
        classes: (H,W), what is done of it.
        tiling: its blocks.

    Raises:
        UnfinishedError: by reading, when the map was given up.
    """

    def __init__(self, classes: Any, tiling: Tiling) -> None:
        self.shape: tuple[int, ...] = classes.shape
        self.chunks: tuple[int, ...] = classes.chunks
        self._classes, self._tiling = classes, tiling
        self._done: set[tuple[int, int]] = set()
        self._given_up = False
        self._changed = threading.Condition()

    def __getitem__(self, key: tuple[slice, slice], /) -> Any:
        rows, columns = key
        tiling = self._tiling
        needed = set(
            itertools.product(
                _blocks(rows, tiling.height, tiling.core_side, tiling.block_rows),
                _blocks(columns, tiling.width, tiling.core_side, tiling.block_columns),
            )
        )
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or needed <= self._done)
            if not needed <= self._done:
                raise UnfinishedError("the map was given up")
        return self._classes[key]

    def add(self, blocks: Iterable[tuple[int, int]]) -> None:
        """These are done."""
        with self._changed:
            self._done.update(blocks)
            self._changed.notify_all()

    def give_up(self) -> None:
        """No more will come; nothing happens to a map that is finished."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()


def _blocks(pixels: slice, length: int, core: int, count: int) -> range:
    """Blocks along one axis in which a slice of pixels lies."""
    start, stop, _ = pixels.indices(length)
    return range(min(start // core, count - 1), min((stop - 1) // core, count - 1) + 1 if stop > start else 0)


class Mapper:
    """Computes the map of one slide into a folder.

    Args:
        model: on its device.
        slide: opened.
        tissue: pixels elsewhere are ``labels.ignore``.
        plan: what to compute.
        folder: of the work in progress; what an earlier run of the same plan left there is kept.
        probabilities: write ``probabilities.zarr`` too.
        batch_size: windows at a time; None takes as many as ``Windows.batch_size`` says.
        readers: threads that read ahead; None takes one for two cores, 8 at most: each needs the memory of what it
            reads, and on the CPU the network needs the cores.
    """

    def __init__(
        self,
        model: TissueModel,
        slide: Slide,
        tissue: Tissue,
        plan: Plan,
        folder: Path,
        *,
        probabilities: bool = False,
        batch_size: int | None = None,
        readers: int | None = None,
    ) -> None:
        self.model, self.slide, self.tissue, self.plan, self.folder = model, slide, tissue, plan, folder
        self.batch_size = batch_size or plan.seen.batch_size(model.device)
        self.readers = readers or max(1, min(8, (os.cpu_count() or 1) // 2))
        self.waiting = Waiting(folder / WAITING)
        tiling, labels = plan.tiling, model.labels
        core = tiling.core_side
        arrays = [CLASSES, PROBABILITIES] if probabilities else [CLASSES]
        if not all(is_array(folder / name) for name in arrays):
            # nothing is done without them, whatever the journal says
            (folder / JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(folder / WAITING, ignore_errors=True)
        self.classes = _array(folder / CLASSES, (tiling.height, tiling.width), (core, core), None, labels.ignore)
        #: what other threads may read while it is computed
        self.growing = GrowingMap(self.classes, tiling)
        self._spare: list[torch.Tensor] = []  # memory of sums, from block to block
        self.probabilities: Any = None
        if probabilities:
            kinds, stride = labels.num_classes, tiling.stride
            self.probabilities = _array(
                folder / PROBABILITIES,
                (kinds, tiling.height, tiling.width),
                (kinds, stride, stride),
                (kinds, core, core),
                0,
            )

    def run(self, progress: Callable[[int], None] | None = None) -> Any:
        """Compute all blocks that are not done.

        Args:
            progress: is told the number of windows after each step, those of an earlier run included.

        Returns:
            The class map, a zarr array (H,W) uint8.
        """
        done = self._done()
        self.growing.add(done)
        tell = progress or (lambda count: None)
        tell(sum(len(self._windows(*block)) for block in done))
        todo = [block for block in self.plan.tiling.blocks() if block not in done]
        release = PacedRelease()
        # reading runs ahead and writing behind, so that the network does not wait for either
        with ThreadPoolExecutor(self.readers) as pool, ThreadPoolExecutor(1) as behind:
            writing: Future[None] | None = None
            try:
                for block, picture in ahead(pool, todo, self._read, self.readers + 1):
                    total = None if picture is None else self._computed(*block, picture, tell)
                    if writing is not None:
                        writing.result()
                    writing = behind.submit(self._written, *block, total)
                    release()
                if writing is not None:
                    writing.result()
            except BaseException:
                self.growing.give_up()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self.classes

    # ---- one block ------------------------------------------------------------------------------------------------

    def _windows(self, row: int, column: int) -> NDArray[np.int64]:
        """(N,2) windows of a block that see tissue."""
        windows = self.plan.tiling.windows(row, column)
        return windows[self.plan.wanted[windows[:, 0], windows[:, 1]]]

    def _read(self, block: tuple[int, int]) -> NDArray[np.uint8] | None:
        """The pixels under the windows of a block, (h,w,3); None where none sees tissue."""
        windows = self._windows(*block)
        if not len(windows):
            return None
        tiling = self.plan.tiling
        top, left = windows.min(0) * tiling.stride
        bottom, right = windows.max(0) * tiling.stride + tiling.side
        box = self.plan.placement.box(top, left, bottom - top, right - left)
        return self.slide.read(box, self.plan.placement.um_per_px)

    @torch.no_grad()
    def _computed(self, row: int, column: int, picture: NDArray[np.uint8], tell: Callable[[int], None]) -> BlockSum:
        """What the windows of a block say."""
        tiling = self.plan.tiling
        total = self._empty(row, column)
        windows = self._windows(row, column)
        corners = windows * tiling.stride
        within = corners - corners.min(0)
        for start in range(0, len(windows), self.batch_size):
            some = slice(start, start + self.batch_size)
            total.add(self._maps(picture, within[some]), *corners[some].T.tolist())
            tell(len(corners[some]))
        return total

    @torch.no_grad()
    def _written(self, row: int, column: int, total: BlockSum | None) -> None:
        """Write a block, with what earlier blocks left for it; it must be the turn of it."""
        if total is not None:  # else no pixel of the block is tissue, whatever others left for it
            for sums in self.waiting.fetch(row, column):
                total.take(sums)
            self._write(row, column, total)
            # before the block counts as done, so that a run that is killed here does it again
            self.waiting.leave(row, column, total.beyond())
            self._spare.append(total.memory)
        self._finish(row, column)

    def _empty(self, row: int, column: int) -> BlockSum:
        """In the memory of a block that is done, where there is one."""
        memory = self._spare.pop() if self._spare else None
        return BlockSum(self.plan.tiling, row, column, self.model.labels.num_classes, self.model.device, memory)

    def _maps(self, picture: NDArray[np.uint8], corners: NDArray[np.int64]) -> torch.Tensor:
        """(N,K,side,side) of windows at corners (N,2) of a picture."""
        side, device = self.plan.tiling.side, self.model.device
        cuts = np.stack([picture[top : top + side, left : left + side] for top, left in corners])
        images = torch.from_numpy(cuts).to(device).movedim(-1, 1).float() / 255
        maps = self.model.mapper(resize_image(images, self.plan.seen.network_side)).float()
        if maps.shape[-1] != side:
            maps = F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
        return maps

    def _write(self, row: int, column: int, total: BlockSum) -> None:
        core = self.plan.tiling.core(row, column)
        inside = self._tissue(row, column) & total.seen().cpu().numpy()
        if not inside.any():
            return
        rows, columns = slice(core.top, core.bottom), slice(core.left, core.right)
        classes = total.likeliest().cpu().numpy()
        self.classes[rows, columns] = np.where(inside, classes, np.uint8(self.model.labels.ignore))
        if self.probabilities is not None:
            scaled = (total.mean() * 255).round().to(torch.uint8).cpu().numpy()
            self.probabilities[:, rows, columns] = np.where(inside, scaled, np.uint8(0))

    def _tissue(self, row: int, column: int) -> NDArray[np.bool_]:
        """(h,w): which pixels of a core have their centre on tissue."""
        core, placement = self.plan.tiling.core(row, column), self.plan.placement
        lines = (np.arange(core.top, core.bottom) + 0.5).astype(np.float64)
        places = (np.arange(core.left, core.right) + 0.5).astype(np.float64)
        rows, columns = placement.to_slide(lines, places)
        return self.tissue.at(rows, columns)

    # ---- what is done ---------------------------------------------------------------------------------------------

    def _done(self) -> set[tuple[int, int]]:
        """Blocks that an earlier run finished; a last line that was cut off does not count."""
        journal = self.folder / JOURNAL
        text = journal.read_text(encoding="ascii") if journal.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_text(journal, whole)  # whole or not at all: a shorter one would lose sums that were forgotten
        done = set()
        for line in whole.splitlines():
            row, column = line.split()
            done.add((int(row), int(column)))
        return done

    def _finish(self, row: int, column: int) -> None:
        with (self.folder / JOURNAL).open("a", encoding="ascii") as journal:
            journal.write(f"{row} {column}\n")
        self.growing.add([(row, column)])
        # the corner is the last that a block waits for; what it used is of no more use
        self.waiting.forget(row, column)


def is_array(path: Path) -> bool:
    """Whether a zarr array was made there: its folder comes first, what it is comes next."""
    return (path / "zarr.json").is_file()


def _array(
    path: Path, shape: tuple[int, ...], chunks: tuple[int, ...], shards: tuple[int, ...] | None, fill: int
) -> Any:
    """A zarr array on disk, made or opened; chunks that hold nothing but ``fill`` are not written."""
    if is_array(path):
        return zarr.open_array(str(path), mode="r+")
    shutil.rmtree(path, ignore_errors=True)  # of a run that was killed while it made one
    return zarr.create_array(
        str(path),
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype="uint8",
        fill_value=fill,
        compressors=ZstdCodec(level=3),
        config={"write_empty_chunks": False},
    )
