"""One image of a data set and what is known about it, read from disk only when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points, Proportions, Tags

if TYPE_CHECKING:
    from PIL import Image as Pillow

IMAGE_SUFFIXES = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")

Image = NDArray[np.uint8]
Mask = NDArray[np.uint8]
MaskDecoder = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


def as_indices(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mask files whose pixel values are the class indices already."""
    return codes


@dataclass(frozen=True)
class Record:
    """One image with the hints and, for simulation and scoring only, the mask that exist for it.

    Args:
        id: unique within the data set and safe as a file name.
        image: file, or (H,W,3) uint8 RGB in memory (synthetic tissue).
        mask: file, or (H,W) uint8 in memory, or None.
        tags: image tags, or None.
        points: labelled pixels, or None.
        proportions: tissue proportions, or None.
        group: patient or case, for splits and folds that keep patients apart; None where the data set has none.
        um_per_px: pixel size in micrometres, None where unknown.
        decode: from the pixel values of the mask file to class indices (255 = ignore); module-level: it pickles.
    """

    id: str
    image: Path | Image
    mask: Path | Mask | None = None
    tags: Tags | None = None
    points: Points | None = None
    proportions: Proportions | None = None
    group: str | None = None
    um_per_px: float | None = None
    decode: MaskDecoder = as_indices

    def read_image(self) -> Image:
        """(H,W,3) uint8 RGB.

        Raises:
            InputError: missing, truncated or not an image.
        """
        return read_image(self.image) if isinstance(self.image, Path) else self.image

    def read_mask(self, labels: LabelSpace) -> Mask:
        """(H,W) uint8 class indices, 255 = ignore, of the same size as the image.

        Raises:
            InputError: no mask, another size than the image, a value that is no class.
        """
        if self.mask is None:
            raise InputError(self.id, "has no mask", "give a mask, or score only images that have one")
        codes = read_codes(self.mask) if isinstance(self.mask, Path) else self.mask
        mask = self.decode(codes)
        subject = self.mask if isinstance(self.mask, Path) else self.id
        height, width = self.size()
        if mask.shape != (height, width):
            rule = f"mask is {mask.shape[0]} x {mask.shape[1]} pixels (height x width), its image {height} x {width}"
            raise InputError(subject, rule, "give a mask of the size of its image")
        unknown = np.setdiff1d(np.unique(mask), [*range(labels.num_classes), labels.ignore])
        if unknown.size:
            rule = f"mask value {int(unknown[0])} is no class (0..{labels.num_classes - 1}, {labels.ignore} = ignore)"
            raise InputError(subject, rule, "write the index of a class, or the ignore value")
        return mask

    def size(self) -> tuple[int, int]:
        """(height, width) of the image without decoding it."""
        if not isinstance(self.image, Path):
            return self.image.shape[0], self.image.shape[1]
        from PIL import Image as Pillow

        try:
            with Pillow.open(self.image) as picture:
                return picture.height, picture.width
        except (OSError, ValueError, Pillow.DecompressionBombError) as error:
            raise _unreadable(self.image, error) from None


@dataclass(frozen=True)
class TissueDataset:
    """A data set as the rest of tissuehint sees it.

    Args:
        name: key in the catalog.
        labels: its classes.
        splits: records of ``train``, ``val`` and ``test`` (``val`` may be empty).
        notes: lines that must stand beside every number (subset, licence, how the split was made).
    """

    name: str
    labels: LabelSpace
    splits: Mapping[str, tuple[Record, ...]]
    notes: tuple[str, ...] = field(default=())


def read_image(path: Path) -> Image:
    """(H,W,3) uint8 RGB of an image file; transparency is laid on white.

    Raises:
        InputError: missing, truncated, not an image, too large to decode, or grey of more than 8 bits (which would be
            cut at 255).
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                rule = f"has mode {picture.mode}, images have 8 bits a channel"
                raise InputError(path, rule, "scale it to 0..255 and save it as RGB")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                layer = picture.convert("RGBA")
                sheet = Pillow.new("RGBA", layer.size, (255, 255, 255, 255))
                return np.asarray(Pillow.alpha_composite(sheet, layer).convert("RGB"))
            return np.asarray(picture.convert("RGB"))
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the path") from None
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def read_codes(path: Path) -> NDArray[np.uint8]:
    """(H,W) uint8 pixel values of a mask file: palette indices, grey values, or 0/1 of a one-bit image.

    Raises:
        InputError: missing, truncated, not an image, or a colour picture.
    """
    from PIL import Image as Pillow

    try:
        with Pillow.open(path) as picture:
            if picture.mode not in ("P", "L", "1", "I;16", "I"):
                rule = f"mask has mode {picture.mode}, masks are one value a pixel (palette or grey)"
                raise InputError(path, rule, "save it as a palette or 8-bit grey PNG")
            stretch = _grey_stretch(picture)
            codes = np.asarray(picture)
    except FileNotFoundError:
        raise InputError(path, "does not exist", "check the path") from None
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise _unreadable(path, error) from None
    if codes.dtype != np.uint8 and not 0 <= codes.min(initial=0) <= codes.max(initial=0) <= 255:
        wrong = codes.max() if codes.max() > 255 else codes.min()
        raise InputError(path, f"has mask value {wrong}, masks are 0..255", "write class indices")
    return codes.astype(np.uint8) // stretch


def _grey_stretch(picture: Pillow.Image) -> np.uint8:
    """Factor by which Pillow stretches grey values of 2 and 4 bits to 0..255; class indices need it undone."""
    modes = {tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in getattr(picture, "tile", ()) if tile[3]}
    return np.uint8(85 if "L;2" in modes else 17 if "L;4" in modes else 1)


def list_images(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name; hidden files left out.

    Raises:
        InputError: the folder is missing.
    """
    if not folder.is_dir():
        raise InputError(folder, "is no folder", "check the path and the layout of the data set")
    names = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted((path for path in names if not path.name.startswith(".")), key=lambda path: path.name)


def _unreadable(path: Path, error: Exception) -> InputError:
    if not path.exists():
        return InputError(path, "does not exist", "check the path")
    reason = " ".join(str(error).split())[:120]
    return InputError(path, f"cannot be read as an image ({reason})", "replace the file, it is damaged or no image")
