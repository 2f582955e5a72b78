"""Slides: one small interface over OpenSlide, tiffslide and plain images.

``Slide.read`` gives the pixels of any box at any size; everything else (levels, formats, transparency, missing or odd
microns per pixel, damaged files) is settled here.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tissuehint.errors import InputError
from tissuehint.slides.coordinates import Box, Origin, Placement
from tissuehint.slides.handles import COPY_AGAIN, WHITE, Handle, open_handle

#: A level serves a read if it is finer than the read, or coarser by no more than this share.
LEVEL_TOLERANCE = 0.01
#: Pixels of a level that are in memory at a time; larger reads go in bands.
BAND = 4_000_000
#: Reads that lie within this many level pixels of whole ones are copied, not resampled.
ALIGNED = 0.02
LARGEST_UM_PER_PX = 100.0
#: The resolution tags of a TIFF also say how large to print it; outside this range they are no microns per pixel.
PLAUSIBLE_TAGS = (0.05, 20.0)
UNEQUAL = 0.01
#: Pixel sizes that differ by less are the same: scanners do not agree better than that.
SAME_SIZE = 0.01


class Slide:
    """A slide that is open; made by ``open_slide``.

    Threads and processes may share it: each opens the file for itself when it first reads. After ``close`` a read
    opens the file again.

    Attributes:
        path: the file.
        name: its name without folder and suffix.
        reader: what reads it: ``openslide``, ``tiffslide`` or ``image``.
        shape: (height, width) of level 0.
        levels: finest first.
        bounds: what was scanned; the whole slide where the file does not say.
        properties: what the file says about itself, names as the reader gives them.
    """

    def __init__(
        self, path: Path, um_per_px: float | None, first: Handle, *, default_um_per_px: float | None = None
    ) -> None:
        self.path, self.name = path, path.stem
        self.reader: str = first.reader
        self.levels = first.levels
        self.shape = (self.levels[0].height, self.levels[0].width)
        self.properties = dict(first.properties)
        self.bounds = _bounds(self.properties, self.shape)
        self._given, self._default = um_per_px, default_um_per_px
        self._start()
        self._register(first)

    @property
    def um_per_px(self) -> float:
        """Side of a level-0 pixel in micrometres: given to ``open_slide``, or what the file says, or the default.

        Raises:
            InputError: neither is there, or the pixels are not square.
        """
        if self._given is not None:
            return self._given
        found = _microns(self.path, self.properties) or self._default
        if found is None:
            rule = "states no microns per pixel"
            raise InputError(self.path, rule, "give --mpp, or a column mpp in a CSV table of the slides")
        return found

    @property
    def takes_default(self) -> bool:
        """Whether ``um_per_px`` is the default of ``open_slide``."""
        return self._given is None and self._default is not None and _microns(self.path, self.properties) is None

    def corner(self, origin: Origin) -> tuple[float, float]:
        """(top, left) of the place from which ``origin`` measures, in level-0 pixels of the slide."""
        return (self.bounds.top, self.bounds.left) if origin == "bounds" else (0.0, 0.0)

    def placement(self, um_per_px: float) -> Placement:
        """Of a map of the bounds at a pixel size; within 1 % of the slide's own, the slide's own pixels are taken."""
        scale = um_per_px / self.um_per_px
        scale = 1.0 if abs(scale - 1) <= SAME_SIZE else scale
        return Placement(scale * self.um_per_px, scale, self.bounds.top, self.bounds.left)

    def read(self, box: Box, um_per_px: float) -> NDArray[np.uint8]:
        """The pixels of a box at a pixel size.

        Args:
            box: level-0 pixels; what lies outside the slide, or is transparent, is white.
            um_per_px: side of the wanted pixels in micrometres.

        Returns:
            (H,W,3) uint8 RGB, H = ``box.height * slide.um_per_px / um_per_px`` rounded, at least 1; W likewise.

        Raises:
            InputError: no microns per pixel, a pixel size that is not above 0, a slide that is damaged or gone.
        """
        if not um_per_px > 0:
            raise InputError(f"{um_per_px} um/px", "is not above 0", "give micrometres per pixel")
        share = self.um_per_px / um_per_px
        return self.resample(box, max(round(box.height * share), 1), max(round(box.width * share), 1))

    def resample(self, box: Box, height: int, width: int) -> NDArray[np.uint8]:
        """The pixels of a box as ``height`` x ``width``; needs no microns per pixel.

        Read from the coarsest level that is fine enough, and averaged over the area of each pixel (a Hamming window
        of two pixels, so that nothing aliases), or bilinear where the slide is coarser. Boxes on whole pixels of a
        level, at its scale, are copied.

        Returns:
            (H,W,3) uint8 RGB, white outside the slide and where it is transparent.

        Raises:
            InputError: a slide that is damaged or gone.
        """
        down, right = box.height / height, box.width / width
        coarsest = max(min(down, right) * (1 + LEVEL_TOLERANCE), 1.0)
        index = max(number for number, level in enumerate(self.levels) if level.downsample <= coarsest)
        factor = self.levels[index].downsample
        down, right, top, left = down / factor, right / factor, box.top / factor, box.left / factor
        copied = _whole(top, height, down) and _whole(left, width, right)
        method = Image.Resampling.HAMMING if max(down, right) > 1 else Image.Resampling.BILINEAR
        margin = math.ceil(max(down, right, 1)) + 1
        columns = math.floor(left) - margin, math.ceil(left + width * right) + margin
        picture = np.empty((height, width, 3), np.uint8)
        step = max(int(BAND / (columns[1] - columns[0]) / down), 1)
        for first in range(0, height, step):
            last = min(first + step, height)
            if copied:
                part = self._window(index, round(top) + first, round(left), last - first, width)
            else:
                rows = math.floor(top + first * down) - margin, math.ceil(top + last * down) + margin
                part = self._window(index, rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])
                start = left - columns[0], top + first * down - rows[0]
                end = start[0] + width * right, start[1] + (last - first) * down
                part = part.resize((width, last - first), method, box=(*start, *end))
            picture[first:last] = np.asarray(part)
        return picture

    def thumbnail(self, longest: int) -> NDArray[np.uint8]:
        """The whole slide, (H,W,3) uint8, its longest side ``longest`` pixels or, for smaller slides, its own."""
        height, width = self.shape
        share = min(longest / max(self.shape), 1.0)
        return self.resample(Box(0, 0, height, width), max(round(height * share), 1), max(round(width * share), 1))

    def close(self) -> None:
        """Close the file wherever this process has it open; waits for reads that are under way."""
        for reference in list(self._handles.values()):
            handle = reference()
            if handle is not None and handle.process == os.getpid():
                with handle.lock:
                    handle.close()
        self._start()

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Slide('{self.path}', {self.shape[0]} x {self.shape[1]}, {self.reader})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_local", "_handles")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._local = threading.local()
        self._handles: dict[int, weakref.ref[Handle]] = {}

    def _register(self, handle: Handle) -> None:
        self._local.handle = handle
        self._handles[threading.get_ident()] = weakref.ref(handle)

    def _handle(self) -> Handle:
        """That of this thread; opened if there is none, if it was closed, or if it came through a fork."""
        handle: Handle | None = getattr(self._local, "handle", None)
        if handle is None or handle.closed or handle.process != os.getpid():
            handle = open_handle(self.path)
            if handle.levels != self.levels:
                raise InputError(self.path, "is another slide than when it was opened", "start again")
            self._register(handle)
        return handle

    def _window(self, index: int, top: int, left: int, height: int, width: int) -> Image.Image:
        """RGB pixels of a level; white outside."""
        level = self.levels[index]
        first = min(max(top, 0), level.height), min(max(left, 0), level.width)
        last = min(max(top + height, 0), level.height), min(max(left + width, 0), level.width)
        size = last[0] - first[0], last[1] - first[1]
        if size == (height, width):
            return self._inside(index, *first, *size)
        picture = Image.new("RGB", (width, height), WHITE)
        if min(size) > 0:
            picture.paste(self._inside(index, *first, *size), (first[1] - left, first[0] - top))
        return picture

    def _inside(self, index: int, top: int, left: int, height: int, width: int) -> Image.Image:
        while True:
            handle = self._handle()
            with handle.lock:
                if handle.closed:  # by another thread, a moment ago
                    continue
                try:
                    return handle.window(index, top, left, height, width)
                except MemoryError:
                    raise
                except Exception as error:
                    # decoders raise what they like; a handle that has seen an error never reads again
                    handle.close()
                    if not self.path.exists():
                        rule = "does not exist any more"
                        raise InputError(self.path, rule, "leave slides in place until the end") from error
                    raise InputError(self.path, f"is damaged or truncated ({error})", COPY_AGAIN) from error


def open_slide(path: Path, *, um_per_px: float | None = None, default_um_per_px: float | None = None) -> Slide:
    """Open a slide with the first of OpenSlide, tiffslide and Pillow that reads it.

    Args:
        path: the file.
        um_per_px: side of a level-0 pixel in micrometres, for slides that do not say or say it wrong; None believes
            the file. A slide without it opens; what needs it says so.
        default_um_per_px: for a file that says none, where ``um_per_px`` is not given.

    Raises:
        InputError: no such file, a folder, an empty, truncated or damaged file, a format that nobody reads, a plain
            image with the name of a slide, or a pixel size that is not in 0..100.
    """
    path = Path(path)
    for value in (um_per_px, default_um_per_px):
        if value is not None and not 0 < value <= LARGEST_UM_PER_PX:
            rule = f"is not above 0 and at most {LARGEST_UM_PER_PX:g}"
            raise InputError(f"{value} um/px", rule, "give micrometres per pixel, 0.25 for 40x")
    return Slide(path, um_per_px, open_handle(path), default_um_per_px=default_um_per_px)


def _whole(start: float, count: int, step: float) -> bool:
    """Whether pixels from ``start`` on, ``step`` apart, are whole pixels of the level."""
    return abs(start - round(start)) < ALIGNED and abs(start + count * step - round(start) - count) < ALIGNED


def _bounds(properties: Mapping[str, str], shape: tuple[int, int]) -> Box:
    """What was scanned, as the file states it; the whole slide where it states nothing that lies on it."""
    whole = Box(0.0, 0.0, float(shape[0]), float(shape[1]))
    for reader in ("openslide", "tiffslide"):
        numbers = [_number(properties, f"{reader}.bounds-{name}") for name in ("y", "x", "height", "width")]
        if None not in numbers:
            top, left, height, width = (number or 0.0 for number in numbers)
            return whole.overlap(Box(top, left, height, width)) or whole
    return whole


def _microns(path: Path, properties: Mapping[str, str]) -> float | None:
    """Side of a level-0 pixel in micrometres as the file states it, or None.

    Scanners state it for both axes; values that cannot be (0, NaN, above 100) count as not stated. In a TIFF that no
    scanner's software signed there are only the resolution tags, believed if they are per centimetre and plausible.
    """
    if _unsigned(properties):
        unit = properties.get("tiff.ResolutionUnit", "").lower()
        per_cm = [_number(properties, f"tiff.{axis}Resolution") or math.inf for axis in "XY"]
        values = [1e4 / value for value in per_cm if unit == "centimeter" and value > 0]
        values = [value for value in values if PLAUSIBLE_TAGS[0] <= value <= PLAUSIBLE_TAGS[1]]
    else:
        stated = (_number(properties, f"{name}.mpp-{axis}") for name in ("openslide", "tiffslide") for axis in "xy")
        values = [value for value in stated if value is not None and 0 < value <= LARGEST_UM_PER_PX]
    if not values:
        return None
    if max(values) > min(values) * (1 + UNEQUAL):
        rule = f"states {values[0]:g} um/px across and {values[1]:g} down: its pixels are not square"
        raise InputError(path, rule, "give --mpp if that is wrong, or resample the slide to square pixels")
    return sum(values) / len(values)


def _unsigned(properties: Mapping[str, str]) -> bool:
    """Whether only the resolution tags can tell the pixel size."""
    if "openslide.vendor" in properties:
        return properties["openslide.vendor"] == "generic-tiff"
    # tiffslide copies these tags only where nothing else told it the size
    return "tiff.XResolution" in properties


def _number(properties: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(properties[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) else None
