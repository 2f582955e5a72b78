"""Where u of each training item is kept between two refreshes: on disk, in the geometry of the unaugmented item."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.files import atomic_path, write_text

CURRENT = "current.txt"
LEVELS = 255  # u is a mean of a few nearly binary maps: eight bits lose nothing that the loss could see


@dataclass(frozen=True)
class Store:
    """Soft targets by item, one folder per refresh; loading processes see a refresh once it is published.

    A refresh goes to a folder of its own, and the one before stays until the next: a run that is killed between a
    refresh and its checkpoint finds what its checkpoint saw.

    Args:
        folder: of the run directory.
    """

    folder: Path

    def write(self, refresh: int, name: str, u: Tensor, covered: tuple[int, int]) -> None:
        """Keep u of one item, 8 bits a value.

        Args:
            refresh: its number.
            name: id of the item.
            u: (C,h,w) in [0,1].
            covered: pixels (height, width) of the item that its h x w cells cover.
        """
        codes = (u.float().cpu().clamp(0, 1) * LEVELS).round().to(torch.uint8).numpy()
        with atomic_path(self._refresh(refresh) / f"{name}.npz") as part, part.open("wb") as file:
            np.savez_compressed(file, u=codes, covered=np.array(covered))

    def publish(self, refresh: int | None) -> None:
        """Make a refresh the one that is read; None reads nothing (training has just begun)."""
        write_text(self.folder / CURRENT, "" if refresh is None else str(refresh))

    def drop_all_but(self, refresh: int | None) -> None:
        """Delete what earlier refreshes wrote."""
        kept = None if refresh is None else self._refresh(refresh)
        for folder in self.folder.glob("refresh_*"):
            if folder != kept:
                shutil.rmtree(folder)

    def __call__(self, name: str) -> Tensor | None:
        """(C,H,W) float of an item in image pixels, or None where the published refresh has none."""
        pointer = self.folder / CURRENT
        number = pointer.read_text() if pointer.is_file() else ""
        path = self._refresh(int(number)) / f"{name}.npz" if number else None
        if path is None or not path.is_file():
            return None
        with np.load(path) as content:
            u, covered = torch.from_numpy(content["u"])[None], content["covered"].tolist()
        return F.interpolate(u, covered, mode="nearest-exact")[0].float() / LEVELS

    def _refresh(self, number: int) -> Path:
        return self.folder / f"refresh_{number:05d}"
