"""Reading the folder layouts and mask codes that several data sets share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.catalog.base import Splits, layout_error, record_id, tags_from_name
from tissuehint.data.records import IMAGE_SUFFIXES, MaskDecoder, Record, as_indices, list_images
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

# JPEG changes class codes, so a JPEG is never taken for a mask
MASK_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in (".jpg", ".jpeg"))

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "valid", "validation")
TEST_FOLDERS = ("test", "testing")
IMAGE_FOLDERS = ("img", "images", "image")
MASK_FOLDERS = ("mask", "masks")


def translate(codes: NDArray[np.uint8], table: bytes) -> NDArray[np.uint8]:
    """Class indices by table: out = table[code]."""
    return np.frombuffer(table, np.uint8)[codes]


def code_table(classes: dict[int, int]) -> MaskDecoder:
    """A decoder that sends file codes to class indices; a code that is not named stays as it is.

    The caller names every code of the format, so that what stays is no class and ``Record.read_mask`` reports it.

    Example:
        >>> code_table({0: 5, 1: 0})(np.array([[0, 1, 9]], np.uint8)).tolist()
        [[5, 0, 9]]
    """
    table = bytearray(range(256))
    for code, label in classes.items():
        table[code] = label
    return partial(translate, table=bytes(table))


def threshold(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Binary mask: 0/1 stays, 8-bit grey with anti-aliased edges is 1 above 127.

    A picture whose largest value lies in 2..127 is neither; it stays, and ``Record.read_mask`` reports the value.

    Example:
        >>> threshold(np.array([[0, 90, 128, 255]], np.uint8)).tolist()
        [[0, 0, 1, 1]]
        >>> threshold(np.array([[0, 1]], np.uint8)).tolist()
        [[0, 1]]
    """
    return (codes > 127).astype(np.uint8) if codes.max(initial=0) > 127 else codes


def find_root(root: Path, ready: Callable[[Path], bool]) -> Path:
    """``root``, or its only subfolder that is ``ready``: archives often hold one folder more than expected."""
    if ready(root):
        return root
    inside = [path for path in sorted(root.iterdir()) if path.is_dir() and ready(path)]
    return inside[0] if len(inside) == 1 else root


def subfolder(root: Path, names: Iterable[str], layout: str) -> Path:
    """The first of ``names`` that exists in ``root``.

    Raises:
        InputError: none does.
    """
    choices = list(names)
    for name in choices:
        if (root / name).is_dir():
            return root / name
    raise layout_error(root / choices[0], f"is missing (also looked for {', '.join(choices[1:])})", layout)


def filled(folder: Path, layout: str) -> list[Path]:
    """Image files of a folder that must have some.

    Raises:
        InputError: there are none.
    """
    images = list_images(folder)
    if not images:
        raise layout_error(folder, f"has no image ({' '.join(IMAGE_SUFFIXES)})", layout)
    return images


def masks_by_stem(folder: Path) -> dict[str, Path]:
    """Mask files of a folder by their name without suffix."""
    return {path.stem: path for path in list_images(folder) if path.suffix.lower() in MASK_SUFFIXES}


def missing_mask(image: Path, folder: Path, stem: str | None = None) -> InputError:
    """The error for an image without its mask, naming both."""
    wanted = folder / f"{stem or image.stem}.png"
    rule = f"has no mask {wanted} (or {' '.join(MASK_SUFFIXES[1:])})"
    return InputError(image, rule, "restore the mask, or remove the image")


def pair_masks(images: Iterable[Path], folder: Path) -> list[tuple[Path, Path]]:
    """Each image with the mask of the same name in ``folder``.

    Raises:
        InputError: an image without a mask.
    """
    masks = masks_by_stem(folder)
    pairs = []
    for image in images:
        if image.stem not in masks:
            raise missing_mask(image, folder)
        pairs.append((image, masks[image.stem]))
    return pairs


@dataclass(frozen=True)
class TaggedPatches:
    """Training patches with tags in their names, validation and test patches with masks.

    Args:
        labels: the classes.
        order: for each bit of a file name the class it stands for; None for a bit that is no tissue class.
        layout: text of the layout, for errors.
        decode: from mask codes to class indices.
        group: from the stem of a file to its patient or slide, None where it has none.
        um_per_px: pixel size in micrometres.
    """

    labels: LabelSpace
    order: tuple[int | None, ...]
    layout: str
    decode: MaskDecoder = as_indices
    group: Callable[[str], str | None] = field(default=lambda stem: None)
    um_per_px: float | None = None

    def read(self, root: Path) -> Splits:
        """Records of the three splits in ``root``.

        Raises:
            InputError: a folder is missing or empty, a patch has no or malformed bits, an image has no mask.
        """
        root = find_root(root, lambda path: any((path / name).is_dir() for name in TRAIN_FOLDERS))
        train = subfolder(root, TRAIN_FOLDERS, self.layout)
        if not list_images(train):
            train = next((train / name for name in IMAGE_FOLDERS if (train / name).is_dir()), train)
        return {
            "train": tuple(self._tagged(path) for path in filled(train, self.layout)),
            "val": self._masked("val", subfolder(root, VAL_FOLDERS, self.layout)),
            "test": self._masked("test", subfolder(root, TEST_FOLDERS, self.layout)),
        }

    def _tagged(self, path: Path) -> Record:
        tags = tags_from_name(path, self.order, self.labels)
        name = record_id("train", path.stem)
        return Record(name, path, tags=tags, group=self.group(path.stem), um_per_px=self.um_per_px)

    def _masked(self, split: str, folder: Path) -> tuple[Record, ...]:
        images = filled(subfolder(folder, IMAGE_FOLDERS, self.layout), self.layout)
        masks = subfolder(folder, MASK_FOLDERS, self.layout)
        return tuple(
            Record(
                record_id(split, image.stem),
                image,
                mask,
                group=self.group(image.stem),
                um_per_px=self.um_per_px,
                decode=self.decode,
            )
            for image, mask in pair_masks(images, masks)
        )


def empty_tags_notes(splits: Splits) -> list[str]:
    """A note on training patches whose bits are all zero: they are kept, and no tag method can learn from them."""
    count = sum(record.tags is not None and not record.tags.values.any() for record in splits["train"])
    return [f"{count} training patches carry no tag at all (all bits 0); training leaves them out"] if count else []
