"""Open files of slides, by OpenSlide, tiffslide and Pillow: pixels of a level, whatever the format."""

from __future__ import annotations

import math
import os
import struct
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openslide
import tifffile
import tiffslide
from PIL import Image, UnidentifiedImageError

from tissuehint.errors import InputError

#: OpenSlide reads from whole level-0 pixels: how near one must be to a whole level pixel, and how far back to look.
NEAR, LOOK_BACK = 0.005, 128
SLIDE_SUFFIXES = frozenset((".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif"))
#: Photometric interpretations that tiffslide gives as grey or RGB: MINISBLACK, RGB, YCBCR.
TIFF_COLOURS = (1, 2, 6)
COPY_AGAIN = "copy the slide again from its source"
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Level:
    """One level of the pyramid.

    Args:
        height, width: its pixels.
        downsample: level-0 pixels per pixel of the level.
    """

    height: int
    width: int
    downsample: float


class Handle:
    """An open file; used by one thread at a time, under its lock."""

    reader = ""

    def __init__(self, sizes: list[tuple[int, int]], properties: Mapping[str, Any]) -> None:
        factors = [_downsample(sizes[0], size) for size in sizes]
        self.levels = tuple(Level(*size, factor) for size, factor in zip(sizes, factors, strict=True))
        self.properties = {name: str(value) for name, value in properties.items() if value is not None}
        self.lock, self.process, self.closed = threading.Lock(), os.getpid(), False

    def window(self, index: int, top: int, left: int, height: int, width: int) -> Image.Image:
        """RGB pixels of a level, inside it."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the file; closing twice does no harm."""
        self.closed = True


class _OpenSlideHandle(Handle):
    reader = "openslide"

    def __init__(self, path: Path) -> None:
        self.slide = openslide.OpenSlide(path)
        super().__init__([(height, width) for width, height in self.slide.level_dimensions], self.slide.properties)
        self.factors: tuple[float, ...] = self.slide.level_downsamples

    def window(self, index: int, top: int, left: int, height: int, width: int) -> Image.Image:
        (row, y), (column, x) = self._start(top, self.factors[index]), self._start(left, self.factors[index])
        size = width + left - column, height + top - row
        picture = self.slide.read_region((x, y), index, size)
        if size != (width, height):
            picture = picture.crop((left - column, top - row, size[0], size[1]))
        return _on_white(picture)

    def is_plain(self) -> bool:
        """Whether it has no lower levels and no scanner's signature."""
        return len(self.levels) == 1 and self.properties.get("openslide.vendor") == "generic-tiff"

    @staticmethod
    def _start(first: int, factor: float) -> tuple[int, int]:
        """Level pixel, at ``first`` or a little before, that begins at a whole level-0 pixel; and that pixel.

        OpenSlide takes whole level-0 pixels and, where they are between level pixels, mixes neighbours.
        """
        pixels = first - np.arange(min(first, LOOK_BACK) + 1)
        places = np.rint(pixels * factor)
        off = np.abs(places / factor - pixels)
        best = int(np.argmax(off < NEAR)) if off.min() < NEAR else int(off.argmin())
        return int(pixels[best]), int(places[best])

    def close(self) -> None:
        super().close()
        self.slide.close()


class _TiffSlideHandle(Handle):
    reader = "tiffslide"

    def __init__(self, path: Path) -> None:
        _check_alone(path)
        self.slide = tiffslide.TiffSlide(path)
        super().__init__([(height, width) for width, height in self.slide.level_dimensions], self.slide.properties)
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
        if page.dtype != np.uint8 or page.photometric not in TIFF_COLOURS:
            self.close()
            raise ValueError(f"pixels are {page.photometric!r} of {page.dtype}, slides have 8-bit RGB")

    def window(self, index: int, top: int, left: int, height: int, width: int) -> Image.Image:
        # tiffslide divides by this factor and rounds down
        factor = self.slide.level_downsamples[index]
        x, y = math.ceil(left * factor), math.ceil(top * factor)
        pixels = np.asarray(self.slide.read_region((x, y), index, (width, height), as_array=True))
        return _on_white(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels)))

    def close(self) -> None:
        super().close()
        self.slide.close()


class _ImageHandle(Handle):
    """A plain image, decoded as a whole."""

    reader = "image"

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                if picture.format != "TIFF" and path.suffix.lower() in SLIDE_SUFFIXES:
                    rule = f"is a {picture.format} image with the name of a slide ({path.suffix})"
                    raise InputError(path, rule, "give the slide itself, or rename it to be read as a plain image")
                if picture.mode.startswith(("I", "F")):
                    rule = f"has pixels of mode {picture.mode}"
                    raise InputError(path, rule, "give images with 8 bits per channel")
                self.picture = _on_white(picture)
                super().__init__([(picture.height, picture.width)], _tags(picture))

    def window(self, index: int, top: int, left: int, height: int, width: int) -> Image.Image:
        return self.picture.crop((left, top, left + width, top + height))


def _on_white(picture: Image.Image) -> Image.Image:
    """RGB, transparent pixels on white."""
    if picture.mode == "RGB":
        return picture.copy() if picture.readonly else picture
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    if picture.mode != "RGBA":
        picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return picture.convert("RGB")
    ground = Image.new("RGB", picture.size, WHITE)
    ground.paste(picture, mask=alpha)
    return ground


def _tags(picture: Image.Image) -> dict[str, str]:
    """Resolution tags of a plain TIFF."""
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    units = {2: "inch", 3: "centimeter"}
    found = {"tiff.XResolution": tags.get(282), "tiff.YResolution": tags.get(283)}
    found["tiff.ResolutionUnit"] = units.get(tags.get(296, 0))
    return {name: str(float(value) if name[5] in "XY" else value) for name, value in found.items() if value is not None}


def open_handle(path: Path) -> Handle:
    """The first reader that takes the file."""
    _check_file(path)
    try:
        handle = _OpenSlideHandle(path)
        return (_pyramid_of_ome(path) if handle.is_plain() else None) or handle
    except openslide.OpenSlideError as error:
        refusal: Exception = error
    if _is_tiff(path):
        _check_tiff(path)
        try:
            return _TiffSlideHandle(path)
        except InputError:
            raise
        except Exception as error:  # tiffslide lets through whatever its decoders raise
            refusal = error
    return _open_image(path, refusal)


def _check_alone(path: Path) -> None:
    """Raise ``InputError`` for an OME-TIFF that names other files as its parts: readers would open these, wherever."""
    with tifffile.TiffFile(path) as file:
        text = file.pages.first.description if file.is_ome else ""
    if not text:
        return
    root = ElementTree.fromstring(text)
    for part in root.iter():
        named = part.get("FileName") if part.tag.rpartition("}")[2] == "UUID" else None
        # a file that was renamed still knows itself
        if named not in (None, path.name) and part.text != root.get("UUID"):
            raise InputError(path, f"is one of several files (it names {named})", "give a slide of one file")


def _pyramid_of_ome(path: Path) -> Handle | None:
    """The file by tiffslide, if that finds the lower levels that an OME-TIFF hides from OpenSlide."""
    try:
        handle = _TiffSlideHandle(path)
    except Exception:  # OpenSlide reads it, so that is no error
        return None
    return handle if len(handle.levels) > 1 else None


def _open_image(path: Path, refusal: Exception) -> Handle:
    try:
        return _ImageHandle(path)
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError(path, f"is too large for a plain image ({error})", "save it as a tiled TIFF") from error
    except UnidentifiedImageError as error:
        if isinstance(refusal, openslide.OpenSlideUnsupportedFormatError):
            rule = "is in no format that OpenSlide, tiffslide or Pillow reads"
            raise InputError(path, rule, "convert it to a pyramidal TIFF") from error
        raise InputError(path, f"is damaged, incomplete or not supported ({refusal})", COPY_AGAIN) from error
    except Exception as error:  # Pillow, too, raises much
        raise InputError(path, f"is damaged or truncated ({error})", COPY_AGAIN) from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError(path, "is a folder", "give the file of the slide")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise InputError(path, "does not exist", "check the path") from error
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})", "check the file and its rights") from error
    if empty:
        raise InputError(path, "is empty (0 bytes)", COPY_AGAIN)


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def _check_tiff(path: Path) -> None:
    """Raise ``InputError`` where directories or pixels of a TIFF lie beyond its end.

    OpenSlide refuses such files; tiffslide would open them with the levels that are left.
    """
    size, problem = path.stat().st_size, ""
    try:
        if not _directories_are_whole(path, size):
            problem = "a directory lies beyond its end"
        else:
            with tifffile.TiffFile(path) as file:
                places = (zip(page.dataoffsets, page.databytecounts, strict=True) for page in file.pages)
                end = max((start + count for place in places for start, count in place), default=0)
            problem = f"its pixels should end at byte {end}" if end > size else ""
    except Exception as error:  # a damaged TIFF breaks tifffile in many ways
        problem = str(error)
    if problem:
        raise InputError(path, f"is a damaged or truncated TIFF of {size} bytes ({problem})", COPY_AGAIN)


def _directories_are_whole(path: Path, size: int) -> bool:
    """Follow the chain of directories of a TIFF until it ends, or leaves the file."""
    with path.open("rb") as file:

        def number(place: int, form: str) -> int:
            file.seek(place)
            return int(struct.unpack(order + form, file.read(struct.calcsize(form)))[0])

        order = "<" if file.read(2) == b"II" else ">"
        link, count, count_form, entry, form = 4, 2, "H", 12, "I"
        if number(2, "H") == 43:  # BigTIFF
            link, count, count_form, entry, form = 8, 8, "Q", 20, "Q"
        seen: set[int] = set()
        while link + struct.calcsize(form) <= size:
            place = number(link, form)
            if place == 0 or place in seen:
                return True
            if place + count > size:
                return False
            seen.add(place)
            link = place + count + entry * number(place, count_form)
    return False


def _downsample(shape: tuple[int, int], level: tuple[int, int]) -> float:
    """Level-0 pixels per pixel of a level, from the sizes (height, width) of both.

    A whole factor where the sizes are those of one, rounded down or up (2967 / 741 is 4, not 4.004); else the mean over
    the axes, as OpenSlide has it.
    """
    factor = round((shape[0] / level[0] + shape[1] / level[1]) / 2)
    if all(small in (large // factor, -(-large // factor)) for large, small in zip(shape, level, strict=True)):
        return float(factor)
    return (shape[0] / level[0] + shape[1] / level[1]) / 2
