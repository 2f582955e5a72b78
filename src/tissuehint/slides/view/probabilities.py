"""Class probabilities at a place of a slide, from ``probabilities.zarr``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from tissuehint.slides.view.paths import inside
from tissuehint.slides.view.record import PROBABILITIES, SlideRecord

METADATA = "zarr.json"


class Probabilities:
    """The probabilities of a slide, opened; one chunk is read for each place.

    Args:
        folder: ``probabilities.zarr``, resolved.
        shape: (K,H,W) that it must have.

    Raises:
        ValueError: another array.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder = folder
        if inside(folder / METADATA, folder) is None:
            raise ValueError(f"{PROBABILITIES} has no {METADATA} of its own")
        array = zarr.open_array(str(folder), mode="r", zarr_format=3)
        if array.shape != shape or array.dtype != np.uint8:
            raise ValueError(f"{PROBABILITIES} is {array.dtype} {array.shape}, not uint8 {shape}")
        self._array = array

    def at(self, row: int, column: int) -> list[float] | None:
        """The probabilities of the classes at a map pixel; None where nothing was mapped, or beside the map."""
        _, height, width = self._array.shape
        if not (0 <= row < height and 0 <= column < width) or not self._own(row, column):
            return None
        values = np.asarray(self._array[:, row, column], np.float64)
        return [round(float(value) / 255, 4) for value in values] if values.any() else None

    def _own(self, row: int, column: int) -> bool:
        """Whether no chunk of a pixel is a link that leads out of the folder: its bytes would be shown as numbers."""
        kinds, height, width = self._array.shards or self._array.chunks
        for kind in range(-(-self._array.shape[0] // kinds)):
            key = self._array.metadata.encode_chunk_key((kind, row // height, column // width))
            path = self.folder / key
            if (path.is_symlink() or path.exists()) and inside(path, self.folder) is None:
                return False
        return True


def open_probabilities(record: SlideRecord) -> Probabilities | None:
    """Those of a finished slide, None where there are none.

    Raises:
        ValueError: an array that does not fit the slide.
    """
    geometry = record.geometry
    folder = inside(record.folder / PROBABILITIES, record.folder)
    if geometry is None or folder is None or not folder.is_dir():
        return None
    return Probabilities(folder, (geometry.labels.num_classes, geometry.map_height, geometry.map_width))
