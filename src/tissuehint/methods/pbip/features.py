"""Features of training patches, from the frozen encoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.data.training_sets import HintSet
from tissuehint.nn.image_encoders import ImageEncoder
from tissuehint.ops.white import white_fraction

BATCH = 32


@dataclass(frozen=True)
class Features:
    """Unit features of some patches of a training set.

    Args:
        items: (M,) places in the set.
        features: (M,D) of length 1.
        white: (M,) share of white pixels.
    """

    items: NDArray[np.int64]
    features: Tensor
    white: NDArray[np.float64]

    def at(self, places: NDArray[np.int64]) -> Features:
        """Those at ``places``, in that order."""
        index = torch.from_numpy(np.ascontiguousarray(places)).to(self.features.device)
        return Features(self.items[places], self.features[index], self.white[places])

    def where(self, chosen: NDArray[np.bool_]) -> Features:
        """Those that are chosen."""
        return self.at(np.flatnonzero(chosen))

    def centred(self, center: Tensor) -> Features:
        """The same patches, with unit vectors of what is left of the features without ``center`` (D,)."""
        return replace(self, features=F.normalize(self.features - center.to(self.features), dim=1))

    def joined(self, other: Features) -> Features:
        """These and others."""
        return Features(
            np.concatenate([self.items, other.items]),
            torch.cat([self.features, other.features]),
            np.concatenate([self.white, other.white]),
        )

    def sorted(self, items: HintSet) -> Features:
        """In the order of their ids, which does not depend on how a folder was listed."""
        return self.at(np.argsort([item_name(items, int(place)) for place in self.items], kind="stable"))


def item_name(items: HintSet, place: int) -> str:
    """Id of an item, without reading its pixels."""
    record = items.records[items.owner[place]]
    if items.grid is None:
        return str(record.id)
    top, left = (int(value) for value in items.corners[place])
    return f"{record.id}_{top}_{left}"


@torch.no_grad()
def bank_features(
    items: HintSet, places: NDArray[np.int64], encoder: ImageEncoder, config: Any, device: torch.device | str
) -> Features:
    """Encode patches, a batch at a time; files are read in threads while the encoder works.

    Args:
        items: patches.
        places: which of them.
        encoder: frozen, on ``device``.
        config: a ``BankConfig``, for what counts as white.
        device: where to compute.
    """

    def read(place: int) -> tuple[Tensor, float]:
        image = items.sample(place).image
        share = white_fraction(image.permute(1, 2, 0).numpy(), config.white_threshold / 255)
        return image, share

    features, white = [torch.zeros(0, encoder.dim, device=device)], list[float]()
    with ThreadPoolExecutor(max_workers=4) as pool:
        for some in _bar([places[start : start + BATCH] for start in range(0, len(places), BATCH)], len(places)):
            images, shares = zip(*pool.map(read, (int(place) for place in some)), strict=True)
            features.append(F.normalize(encode_images(encoder, images, device), dim=1))
            white += shares
    return Features(np.asarray(places, np.int64), torch.cat(features), np.asarray(white, np.float64))


def encode_images(encoder: ImageEncoder, images: tuple[Tensor, ...], device: torch.device | str) -> Tensor:
    """(b,D) of images (3,h,w) in [0,1], each of its own size."""
    sized = [encoder.resize(image[None].to(device)) for image in images]
    vectors: Tensor = encoder(torch.cat(sized))
    return vectors


def _bar(batches: list[NDArray[np.int64]], count: int) -> Iterator[NDArray[np.int64]]:
    """A progress bar on a terminal, for banks that take longer than a moment."""
    if count < 10 * BATCH or not sys.stderr.isatty():
        yield from batches
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(batches, f"image bank: {count} patches", console=Console(stderr=True), transient=True)
