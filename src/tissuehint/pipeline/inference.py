"""Tissue maps of whole records, with stage 1 or with a TissueModel, on the device of the run."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.data.module import TissueData
from tissuehint.data.patches import PatchGrid, presence_tags, proportion_rows, sliding_map
from tissuehint.data.records import Record
from tissuehint.data.samples import Batch
from tissuehint.data.training_sets import to_tensor, window_id
from tissuehint.methods.base import WeakMethod
from tissuehint.model import TissueModel
from tissuehint.pipeline.recipe import TrainerSettings


def inference_device(settings: TrainerSettings) -> torch.device:
    """The GPU of this process where the trainer uses one, else the CPU."""
    if settings.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        rank = int(os.environ.get("LOCAL_RANK", 0))
        chosen = settings.devices
        number = chosen[rank % len(chosen)] if isinstance(chosen, list) and chosen else rank
        return torch.device("cuda", number % torch.cuda.device_count())
    if settings.accelerator in ("auto", "mps", "gpu") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


class StageOneMaps:
    """Tissue maps of a weak method, by sliding its patches over an image.

    Args:
        method: trained.
        data: reads images and hints.
        grid: windows; None takes the image whole.
        batch_size: windows at a time.
        device: where to compute.
    """

    def __init__(
        self, method: WeakMethod, data: TissueData, grid: PatchGrid | None, batch_size: int, device: torch.device
    ) -> None:
        self.method = method.to(device).eval()
        self.data = data
        self.grid = grid
        self.batch_size = batch_size
        self.device = device

    @torch.no_grad()
    def predicted(self, record: Record) -> Tensor:
        """(K,H,W) without labels."""

        def mapper(images: Tensor, corners: list[tuple[int, int]]) -> Tensor:
            return self.method.predict(images.to(self.device))

        return self._slide(record, mapper)

    @torch.no_grad()
    def guided(self, record: Record) -> Tensor:
        """(K,H,W) with the hints of the record; zero where a window has no tagged class."""
        hints = self._hints(record)

        def mapper(images: Tensor, corners: list[tuple[int, int]]) -> Tensor:
            return self.method.label_guided(hints.batch(images, corners).to(self.device))

        return _even(self._slide(record, mapper))

    @torch.no_grad()
    def tags_only(self, record: Record, prior: Tensor) -> Tensor:
        """(K,H,W) of the tags alone, no image seen: the tagged classes of a window, ties broken by ``prior`` (C,)."""
        hints = self._hints(record)
        channels = self.data.labels.num_classes

        def mapper(images: Tensor, corners: list[tuple[int, int]]) -> Tensor:
            tags = hints.batch(images, corners).need_tags()
            shares = tags * (1 + 1e-3 * prior)
            maps = torch.zeros(len(images), channels)
            maps[:, : tags.shape[1]] = shares / shares.sum(1, keepdim=True).clamp_min(1e-8)
            return maps[:, :, None, None].expand(-1, -1, *images.shape[-2:])

        return _even(self._slide(record, mapper))

    @torch.no_grad()
    def explain(self, record: Record) -> dict[str, Tensor]:
        """Named maps (n,H,W) of how the method reads a record and its hints, each in [0,1].

        Where images are cut into windows, the mean over the windows that see a pixel for methods that learn from tags
        or proportions, whose maps speak of the same classes in every window; for others none.
        """
        if self.grid is not None and self.method.supervision == "points":
            return {}
        hints, channels = self._hints(record), dict[str, int]()

        def mapper(images: Tensor, corners: list[tuple[int, int]]) -> Tensor:
            found = self.method.explain(hints.batch(images, corners).to(self.device))
            # without what is no map of the image: presence of a class, pictures of the image bank
            maps = {
                name: values.float()
                for name, values in found.items()
                if min(values.shape[-2:]) > 1 and not name.endswith("_images")
            }
            channels.update({name: values.shape[1] for name, values in maps.items()})
            size = images.shape[-2:]
            return torch.cat(
                [F.interpolate(each, size, mode="bilinear", align_corners=False) for each in maps.values()], 1
            )

        slid = self._slide(record, mapper).cpu()
        parts = torch.split(slid, list(channels.values()))
        return {
            name: _from_lowest(maps) if name.endswith("_energy") else _picture(maps)
            for name, maps in zip(channels, parts, strict=True)
        }

    def _slide(self, record: Record, mapper: Callable[[Tensor, list[tuple[int, int]]], Tensor]) -> Tensor:
        image = to_tensor(self.data.read(record))
        return sliding_map(mapper, image, self.grid, batch_size=self.batch_size)

    def _hints(self, record: Record) -> _WindowHints:
        return _WindowHints(self.method, self.data, record, self.grid)


class _WindowHints:
    """Hints of the windows of one record."""

    def __init__(self, method: WeakMethod, data: TissueData, record: Record, grid: PatchGrid | None) -> None:
        self.supervision = method.supervision
        self.data = data
        self.grid = grid
        from_mask = grid is not None and self.supervision != "points" and record.mask is not None
        self.mask = record.read_mask(data.labels) if from_mask else None
        self.record = record if from_mask else data.with_hint(record, self.supervision)

    def batch(self, images: Tensor, corners: list[tuple[int, int]]) -> Batch:
        names, count, record = [self.record.id] * len(images), len(images), self.record
        if self.mask is not None and self.grid is not None:
            labels, places = self.data.labels, np.asarray(corners, np.int64)
            if self.supervision == "proportions":
                return Batch(names, images, proportions=self._window_proportions(places))
            present = presence_tags(self.mask, places, self.grid, labels.num_tissue, labels.ignore)
            return Batch(names, images, tags=torch.from_numpy(present).float())
        tags = None if record.tags is None else torch.from_numpy(record.tags.values).float().repeat(count, 1)
        shares = record.proportions
        proportions = None if shares is None else torch.from_numpy(shares.values).float().repeat(count, 1)
        points = None if record.points is None else self._points(corners)
        return Batch(names, images, tags=tags, points=points, proportions=proportions)

    def _window_proportions(self, corners: NDArray[np.int64]) -> Tensor:
        """Those of each window, (B,C); 0 for a window without tissue."""
        assert self.mask is not None
        assert self.grid is not None
        shares = proportion_rows(self.mask, corners, self.grid, self.data.labels.num_tissue)
        for row, (top, left) in enumerate(corners):
            known = np.isfinite(shares[row]).all()
            name = window_id(self.record, int(top), int(left))
            shares[row] = self.data.estimated(shares[row], name) if known else 0.0
        return torch.from_numpy(shares).float()

    def _points(self, corners: list[tuple[int, int]]) -> list[Tensor]:
        """Points of each window in its own pixels."""
        assert self.record.points is not None
        rows = torch.from_numpy(self.record.points.rows)
        if self.grid is None:
            return [rows] * len(corners)
        scale, parts = self.grid.network_side / self.grid.side, []
        for top, left in corners:
            moved = rows - torch.tensor([top, left, 0])
            moved = moved[((moved[:, :2] >= 0) & (moved[:, :2] < self.grid.side)).all(1)]
            moved[:, :2] = ((moved[:, :2] + 0.5) * scale).floor().long()
            parts.append(moved)
        return parts


def _picture(maps: Tensor) -> Tensor:
    """The part above 0, divided by its largest value where that is above 1."""
    shown = maps.clamp_min(0)
    return shown / shown.amax().clamp_min(1)


def _from_lowest(maps: Tensor) -> Tensor:
    """From 0 at the smallest value to 1 at the largest; energies have no natural ends."""
    low, high = maps.amin(), maps.amax()
    return (maps - low) / (high - low).clamp_min(1e-12)


def _even(tissue_map: Tensor) -> Tensor:
    """Scale pixels to sum 1 where any window spoke; pixels of windows without hints stay zero."""
    return tissue_map / tissue_map.sum(0, keepdim=True).clamp_min(1e-8)


def model_maps(model: TissueModel, data: TissueData, batch_size: int) -> Callable[[Record], Tensor]:
    """From a record to its (K,H,W), with a TissueModel."""
    return lambda record: model.predict(data.read(record), batch_size=batch_size)


def pseudo_mask(tissue_map: Tensor, min_confidence: float, ignore: int) -> NDArray[np.uint8]:
    """(K,H,W) probabilities to an (H,W) uint8 mask; pixels without any, or with less than asked for, are ignored."""
    confidence, label = tissue_map.max(0)
    decided = (confidence > 0) & (confidence >= min_confidence)
    mask = torch.where(decided, label, torch.full_like(label, ignore))
    return np.asarray(mask.to(torch.uint8).cpu().numpy())
