"""Synthetic whole slides with exact ground truth: pyramidal TIFFs of any size, written in bounded memory.

A slide is a mosaic: smooth random fields say which class lies where, and each class shows one rendered square of
synthetic tissue, mirrored at its borders so that no seam shows. Rendering 10^8 pixels takes seconds instead of minutes,
and the mask stays exact.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from tissuehint.data.phantom_slide_description import aperio, leica
from tissuehint.data.phantom_slide_tissue import SlideTissue
from tissuehint.errors import InputError
from tissuehint.files import atomic_path

SMALLEST_SIDE = 32
# The default pyramid ends with a level whose longest side is below this.
SMALLEST_LEVEL = 2048
THUMBNAIL = 768
LARGEST_STEP = 8
# Above this many pixels a classic TIFF might not hold the file.
BIG = 2_000_000_000

Progress = Callable[[float], None]


class _Source(Protocol):
    """A picture (H,W,3) uint8 that gives any window inside it."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def window(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]: ...


def write_phantom_slide(
    path: Path,
    height: int,
    width: int,
    *,
    seed: int = 0,
    um_per_px: float = 0.5,
    tile: int = 256,
    levels: Sequence[float] | None = None,
    blank: float = 0.4,
    margins: tuple[int, int, int, int] | None = None,
    mask_path: Path | None = None,
    quality: int = 85,
    progress: Progress | None = None,
) -> None:
    """Write a slide of synthetic tissue as a pyramidal tiled JPEG TIFF; it is whole or absent.

    The layout is that of an Aperio slide (OpenSlide and tiffslide read levels and um/px from it), or, with ``margins``,
    that of a Leica slide: an area around what was scanned that is transparent, and the bounds of the scan. Memory is
    that of a few tiles; a temporary file beside the target holds the lower levels meanwhile, a twelfth of the pixels.

    Args:
        path: file to write, ``.svs`` or ``.tif`` (with margins ``.scn`` or ``.tif``).
        height, width: pixels of what was scanned, at least 32.
        seed: the same seed gives the same slide.
        um_per_px: pixel size in micrometres, 0.1 to 4.
        tile: side of the tiles in pixels, a multiple of 16.
        levels: downsample of each level, from 1 on, each at most 8 times the one before; sizes are rounded down. None
            takes 1, 4, 16... until a level is smaller than 2048 pixels.
        blank: share of the slide without tissue, 0 to 1.
        margins: pixels of glass above, left of, below and right of what was scanned.
        mask_path: where to write the exact class indices, as a tiled uint8 TIFF of ``height`` x ``width``.
        quality: of the JPEG, 1 to 100.
        progress: called with the share in [0,1] that is done.

    Raises:
        InputError: a size, a pixel size, a tile, a level or a share out of range.
        OSError: as the file system says.
    """
    _check(height, width, um_per_px, tile, blank, margins)
    factors = _levels(levels, height, width)
    slide = SlideTissue.random(height, width, seed=seed, um_per_px=um_per_px, blank=blank)
    chain = _with_thumbnail(factors, height, width)
    # full-size passes: the first lower level, level 0, the mask; the rest is small
    meter = _Meter(progress, height * width * ((len(chain) > 1) + 1 + (mask_path is not None)))
    bigtiff = height * width > BIG
    with ExitStack() as stack:
        part = stack.enter_context(atomic_path(Path(path)))
        spare = stack.enter_context(tempfile.TemporaryFile(dir=part.parent))
        sources = _pyramid(slide, chain, spare, tile, meter)
        with tifffile.TiffWriter(part, bigtiff=bigtiff) as file:
            _Layout(tile, quality, um_per_px, margins).write(file, sources[: len(factors)], sources[-1], meter)
        if mask_path is not None:
            mask_part = stack.enter_context(atomic_path(Path(mask_path)))
            with tifffile.TiffWriter(mask_part, bigtiff=bigtiff) as file:
                _write_mask(file, slide, tile, meter)
    meter.finish()


class _Meter:
    """Tells how much of the work is done, counted in pixels."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, pixels: int) -> None:
        self.done += pixels
        if self.progress is not None:
            self.progress(min(self.done / self.total, 0.999))

    def finish(self) -> None:
        if self.progress is not None:
            self.progress(1.0)


@dataclass(frozen=True)
class _Stored:
    """A lower level, raw in a temporary file; mapped only while a window is copied, so that memory stays small."""

    file: IO[bytes]
    offset: int
    height: int
    width: int

    def rows(self, top: int, height: int) -> np.memmap[Any, np.dtype[np.uint8]]:
        place = self.offset + 3 * top * self.width
        return np.memmap(self.file, np.uint8, "r+", offset=place, shape=(height, self.width, 3))

    def window(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """(H,W,3) uint8 copy of a window inside the level."""
        return np.array(self.rows(top, height)[:, left : left + width])


def _pyramid(slide: SlideTissue, factors: list[float], spare: IO[bytes], tile: int, meter: _Meter) -> list[_Source]:
    """The slide and its lower levels, each the mean of the one before."""
    sources: list[_Source] = [slide]
    end = 0
    for above, factor in itertools.pairwise(factors):
        level = _Stored(spare, end, max(int(slide.height / factor), 1), max(int(slide.width / factor), 1))
        end += 3 * level.height * level.width
        spare.truncate(end)
        for top, left, height, width in _windows(level.height, level.width, tile):
            pixels, read = _reduced(sources[-1], top, left, height, width, factor / above)
            level.rows(top, height)[:, left : left + width] = pixels
            meter.add(read)
        sources.append(level)
    return sources


def _reduced(
    source: _Source, top: int, left: int, height: int, width: int, step: float
) -> tuple[NDArray[np.uint8], int]:
    """A window of the next level, and how many pixels of ``source`` it took; a next pixel is the mean of its area."""
    first = int(top * step), int(left * step)
    last = min(-int(-(top + height) * step // 1), source.height), min(-int(-(left + width) * step // 1), source.width)
    pixels = source.window(*first, last[0] - first[0], last[1] - first[1])
    box = (
        left * step - first[1],
        top * step - first[0],
        min((left + width) * step - first[1], pixels.shape[1]),
        min((top + height) * step - first[0], pixels.shape[0]),
    )
    small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX, box=box)
    return np.asarray(small), pixels.shape[0] * pixels.shape[1]


@dataclass(frozen=True)
class _Layout:
    """How the pictures of a slide are put into a TIFF.

    Args:
        tile: side of the tiles in pixels.
        quality: of the JPEG.
        um_per_px: of level 0.
        margins: (top, left, bottom, right) glass, or None.
    """

    tile: int
    quality: int
    um_per_px: float
    margins: tuple[int, int, int, int] | None

    def write(self, file: tifffile.TiffWriter, levels: list[_Source], small: _Source, meter: _Meter) -> None:
        """Write the levels and a small picture, in the order that readers of the format expect."""
        thumbnail = small.window(0, 0, small.height, small.width)
        if self.margins is None:
            self._level(
                file,
                levels[0],
                levels[0],
                meter,
                aperio(levels[0].height, levels[0].width, self.tile, self.quality, self.um_per_px),
            )
            file.write(thumbnail, photometric="rgb", rowsperstrip=16, compression="jpeg", metadata=None, software=False)
        else:
            scale = levels[0].width / small.width
            top, left, bottom, right = (round(pixels / scale) for pixels in self.margins)
            macro = np.pad(thumbnail, ((top, bottom), (left, right), (0, 0)), constant_values=255)
            sizes = [(level.height, level.width) for level in levels]
            text = leica(sizes, (macro.shape[0], macro.shape[1]), self.margins, self.um_per_px)
            file.write(macro, description=text, tile=(self.tile, self.tile), **self._options(scale))
            self._level(file, levels[0], levels[0], meter)
        for level in levels[1:]:
            self._level(file, level, levels[0], meter)

    def _level(
        self, file: tifffile.TiffWriter, level: _Source, base: _Source, meter: _Meter, description: str | None = None
    ) -> None:
        shape = (level.height, level.width, 3)
        tiles = _tiles(level.window, level.height, level.width, self.tile, meter)
        options = self._options(base.width / level.width)
        file.write(tiles, shape=shape, dtype=np.uint8, tile=(self.tile,) * 2, description=description, **options)

    def _options(self, scale: float) -> dict[str, Any]:
        """Options of a picture whose pixel is ``scale`` pixels of level 0."""
        per_cm = 1e4 / (self.um_per_px * scale)
        return {
            "photometric": "rgb",  # what goes in; JPEG makes it YCbCr
            "subsampling": (2, 2),
            "compression": "jpeg",
            "compressionargs": {"level": self.quality},
            "resolution": (per_cm, per_cm),
            "resolutionunit": "CENTIMETER",
            "metadata": None,
            "software": False,
            "maxworkers": 1,
        }


def _write_mask(file: tifffile.TiffWriter, slide: SlideTissue, tile: int, meter: _Meter) -> None:
    tiles = _tiles(slide.classes, slide.height, slide.width, tile, meter)
    per_cm = 1e4 / slide.um_per_px
    file.write(
        tiles,
        shape=(slide.height, slide.width),
        dtype=np.uint8,
        tile=(tile, tile),
        photometric="minisblack",
        compression="zlib",
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        metadata=None,
        software=False,
        maxworkers=1,
    )


def _tiles(
    window: Callable[[int, int, int, int], NDArray[np.uint8]], height: int, width: int, tile: int, meter: _Meter
) -> Iterator[NDArray[np.uint8]]:
    """The tiles of a picture, row by row; those that reach over the edge repeat their last pixels."""
    for top, left, tall, wide in _windows(height, width, tile):
        pixels = window(top, left, tall, wide)
        meter.add(tall * wide)
        missing = [(0, tile - tall), (0, tile - wide), (0, 0)][: pixels.ndim]
        yield pixels if (tall, wide) == (tile, tile) else np.pad(pixels, missing, mode="edge")


def _windows(height: int, width: int, side: int) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) of the windows that cover a picture, cut at its edge."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield top, left, min(side, height - top), min(side, width - left)


def _levels(levels: Sequence[float] | None, height: int, width: int) -> list[float]:
    """The downsample of each level, checked."""
    if levels is None:
        factors = [1.0]
        while max(height, width) / factors[-1] >= SMALLEST_LEVEL:
            factors.append(4 * factors[-1])
        return factors
    factors = [float(level) for level in levels]
    steps = [below / above for above, below in itertools.pairwise(factors)]
    if not factors or factors[0] != 1 or not all(1 < step <= LARGEST_STEP for step in steps):
        rule = f"are {list(levels)}, not increasing from 1 by at most {LARGEST_STEP} times"
        raise InputError("levels of a phantom slide", rule, "write 1, 4, 16, say")
    if min(height, width) / factors[-1] < 1:
        rule = f"end at {factors[-1]:g}, a slide of {height} x {width} pixels is nothing there"
        raise InputError("levels of a phantom slide", rule, "leave out the last")
    return factors


def _with_thumbnail(factors: list[float], height: int, width: int) -> list[float]:
    """The levels, and further ones until one is small enough for a thumbnail."""
    factors = list(factors)
    while max(height, width) / factors[-1] > THUMBNAIL:
        factors.append(factors[-1] * min(LARGEST_STEP, max(2, max(height, width) / factors[-1] // THUMBNAIL + 1)))
    return factors


def _check(
    height: int, width: int, um_per_px: float, tile: int, blank: float, margins: tuple[int, int, int, int] | None
) -> None:
    if min(height, width) < SMALLEST_SIDE:
        rule = f"is {height} x {width} pixels, the smallest side is {SMALLEST_SIDE}"
        raise InputError("phantom slide", rule, "ask for a larger slide")
    if not 0.1 <= um_per_px <= 4:
        raise InputError(f"um_per_px {um_per_px}", "is not in 0.1..4", "give micrometres per pixel, 0.5 is 20x")
    if tile < 16 or tile % 16:
        raise InputError(f"tile {tile}", "is not a multiple of 16, as TIFF wants", "take 256")
    if not 0 <= blank <= 1:
        raise InputError(f"blank {blank}", "is not in 0..1", "give the share of the slide without tissue")
    if margins is not None and min(margins) < 0:
        raise InputError(f"margins {margins}", "has a negative number", "give pixels above, left, below and right")
