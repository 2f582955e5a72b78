"""The pixels under a class map: those of the slide, and those of its thumbnail where they are fine enough."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tissuehint.errors import InputError
from tissuehint.slides.coordinates import Box
from tissuehint.slides.reader import Slide, open_slide
from tissuehint.slides.view.pyramid import Pyramid, Tile
from tissuehint.slides.view.record import Geometry

QUALITY = 90
LARGEST_PICTURE = 8192  # px, of a thumbnail
WHITE = (255, 255, 255)


class Thumbnail:
    """A small picture of a whole slide; threads may share it.

    Args:
        path: of the picture.
        geometry: of the slide that it shows.

    Raises:
        OSError, ValueError: a picture that cannot be read.
    """

    def __init__(self, path: Path, geometry: Geometry) -> None:
        with Image.open(path, formats=["JPEG"]) as picture:
            _check_size(path, picture)
            small = picture.convert("RGB")
        self.across, self.down = geometry.width / small.width, geometry.height / small.height
        # the last pixels of a coarse tile reach beyond the slide
        coarsest = 2 ** (Pyramid(geometry.height, geometry.width).last - Pyramid(geometry.height, geometry.width).first)
        margin = math.ceil(coarsest / min(self.across, self.down)) + 1
        self._picture = Image.new("RGB", (small.width + margin, small.height + margin), WHITE)
        self._picture.paste(small)

    def shows(self, tile: Tile) -> bool:
        """Whether it is at least as fine as a tile."""
        return max(self.across, self.down) <= tile.step

    def tile(self, tile: Tile) -> NDArray[np.uint8]:
        """(rows, columns, 3) uint8, resampled."""
        box = tile.box
        part = (box.left / self.across, box.top / self.down, box.right / self.across, box.bottom / self.down)
        small = self._picture.resize((tile.columns, tile.rows), Image.Resampling.BILINEAR, box=part)
        return np.asarray(small)


class Pixels:
    """Tiles of a slide; threads may share it.

    Args:
        slide: opened, or None where only its thumbnail is known.
        thumbnail: None where there is none.
    """

    def __init__(self, slide: Slide | None, thumbnail: Thumbnail | None) -> None:
        self.slide, self.thumbnail = slide, thumbnail

    @property
    def source(self) -> str | None:
        """What is shown at the finest zoom: ``slide``, ``thumbnail`` or None."""
        return "slide" if self.slide is not None else "thumbnail" if self.thumbnail is not None else None

    def tile(self, tile: Tile) -> NDArray[np.uint8] | None:
        """(rows, columns, 3) uint8, white outside of the slide; None where nothing is known.

        Coarse tiles come from the thumbnail: a slide without coarse levels would be read whole for them.
        """
        if self.thumbnail is not None and (self.slide is None or self.thumbnail.shows(tile)):
            return self.thumbnail.tile(tile)
        if self.slide is None:
            return None
        box = tile.box
        return self.slide.read(Box(box.top, box.left, box.height, box.width), self.slide.um_per_px * tile.step)


def open_same(path: Path, geometry: Geometry) -> Slide:
    """The slide in a file, at its recorded pixel size.

    Raises:
        InputError: no slide, or one of another size than the mapped one.
    """
    slide = open_slide(path, um_per_px=geometry.um_per_px)
    if slide.shape != (geometry.height, geometry.width):
        slide.close()
        expected = f"{geometry.height} x {geometry.width}"
        raise InputError(path, f"is {slide.shape[0]} x {slide.shape[1]} px, the mapped one was {expected}", "check it")
    return slide


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """(H,W,3) uint8 as JPEG, its colours as fine as its brightness."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def shrunk(path: Path, side: int, aspect: float | None = None) -> bytes:
    """A picture file as JPEG, its longer side ``side`` px at most.

    Args:
        path: of the picture.
        side: px.
        aspect: height by width of what is kept of it, from the top: below may stand a legend. None keeps all.

    Raises:
        OSError, ValueError: a picture that cannot be read.
    """
    with Image.open(path, formats=["JPEG"]) as picture:
        _check_size(path, picture)
        picture.draft("RGB", (side, side))
        small = picture.convert("RGB")
    if aspect is not None:
        small = small.crop((0, 0, small.width, min(small.height, max(1, round(small.width * aspect)))))
    small.thumbnail((side, side))
    return jpeg(np.asarray(small))


def _check_size(path: Path, picture: Image.Image) -> None:
    if max(picture.size) > LARGEST_PICTURE:
        raise ValueError(f"{path.name} is {picture.width} x {picture.height} px, no thumbnail")
