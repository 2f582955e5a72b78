"""From tissue maps to rows of the score table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.data.records import Record
from tissuehint.labels import LabelSpace
from tissuehint.metrics import (
    PROTOCOL_IDS,
    BinaryHistogram,
    CalibrationBins,
    boundary_counts,
    boundary_distance,
    boundary_iou_from_counts,
    decide,
    proportion_errors,
    proportions_of,
    protocol_confusion,
    protocol_scores,
)
from tissuehint.metrics.protocols import Protocol
from tissuehint.pipeline.processes import gather, share

TissueMapOf = Callable[[Record], Tensor]
MaskOf = Callable[[Record], NDArray[np.uint8]]


@dataclass
class SplitScores:
    """Counts over all pixels of a split; scores are computed once, from the sums.

    Args:
        labels: the classes.
        protocols: each has its own confusion matrix.
        distances: widths of the boundary band in pixels; 0 stands for 2 % of the image diagonal.
    """

    labels: LabelSpace
    protocols: Sequence[Protocol]
    distances: Sequence[int] = (0,)
    images: int = 0
    confusion: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    boundary: dict[tuple[str, int], NDArray[np.int64]] = field(default_factory=dict)
    used_distances: dict[int, set[int]] = field(default_factory=dict)
    histograms: list[BinaryHistogram] = field(default_factory=list)
    shares: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list)
    calibration: CalibrationBins = field(default_factory=CalibrationBins)

    def update(self, tissue_map: Tensor, mask: NDArray[np.uint8]) -> None:
        """Count one image.

        Args:
            tissue_map: (K,H,W) probabilities, on any device.
            mask: (H,W) truth.
        """
        labels, target = self.labels, torch.from_numpy(mask).to(tissue_map.device)
        self.images += 1
        for protocol in self.protocols:
            prediction = decide(tissue_map[None], labels.num_tissue, protocol)[0]
            counts = protocol_confusion(prediction, target, labels.num_tissue, protocol, labels.white, labels.ignore)
            self._add(self.confusion, protocol, counts.cpu().numpy())
            self._count_boundary(prediction, target, protocol)
        tissue = tissue_map[: labels.num_tissue].argmax(0).to(torch.uint8)
        self._count_probabilities(tissue_map, target)
        counted = target < labels.num_tissue
        if bool(counted.any()):
            true, seen = (proportions_of(values[counted][None], labels.num_tissue) for values in (target, tissue))
            self.shares.append((seen, true))

    def merge(self, other: SplitScores) -> None:
        """Add the counts of another part of the split."""
        self.images += other.images
        for protocol, counts in other.confusion.items():
            self._add(self.confusion, protocol, counts)
        for key, counts in other.boundary.items():
            self._add(self.boundary, key, counts)
        for distance, used in other.used_distances.items():
            self.used_distances.setdefault(distance, set()).update(used)
        if self.histograms and other.histograms:
            for mine, theirs in zip(self.histograms, other.histograms, strict=True):
                mine.counts += theirs.counts
        else:
            self.histograms = self.histograms or deepcopy(other.histograms)
        self.shares += other.shares
        self.calibration.merge(other.calibration)

    def rows(self, **names: Any) -> list[dict[str, Any]]:
        """One row of the score table per protocol; ``names`` (stage, split, gate, ...) stand in each."""
        return [{**names, **self._row(protocol)} for protocol in self.protocols if protocol in self.confusion]

    def _row(self, protocol: Protocol) -> dict[str, Any]:
        tissue = self.labels.tissue
        scores = protocol_scores(self.confusion[protocol], len(tissue))
        row: dict[str, Any] = {"protocol": protocol, "protocol_id": PROTOCOL_IDS[protocol]}
        row |= {key: float(scores[key]) for key in ("miou", "fwiou", "dice_mean", "dice_from_miou", "accuracy")}
        row["iou"] = _named(tissue, scores["iou"])
        row |= self._boundary_row(protocol)
        binary = [histogram.scores() for histogram in self.histograms]
        for key in ("kappa", "auc", "precision"):
            row[key] = _named(tissue, [scores[key] for scores in binary])
        if self.shares:
            seen, true = (np.stack([pair[side] for pair in self.shares]) for side in (0, 1))
            errors = proportion_errors(seen, true)
            row["proportion_mae"] = _named(tissue, errors["mae"])
            row |= {f"proportion_{key}": float(errors[key]) for key in ("mae_mean", "kl", "w1")}
        row["calibration_error"] = self.calibration.error()
        row["images"] = self.images
        row["pixels"] = int(self.confusion[protocol].sum())
        return row

    def _boundary_row(self, protocol: Protocol) -> dict[str, Any]:
        """Default distance first; further distances as ``boundary_miou_d<pixels>``."""
        row: dict[str, Any] = {}
        for distance in self.distances:
            values = np.asarray(boundary_iou_from_counts(self.boundary[protocol, distance]))
            values = values[: self.labels.num_tissue]
            mean = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
            if distance:
                row[f"boundary_miou_d{distance}"] = mean
                continue
            used = sorted(self.used_distances[0])
            row["boundary_miou"], row["boundary_iou"] = mean, _named(self.labels.tissue, values)
            row["boundary_distance"] = used[0] if len(used) == 1 else f"{used[0]} to {used[-1]}"
        return row

    def _count_boundary(self, prediction: Tensor, target: Tensor, protocol: Protocol) -> None:
        labels = self.labels
        if protocol == "ignore_white" and labels.white is not None:
            target = torch.where(target == labels.white, labels.ignore, target)
        height, width = target.shape
        for distance in self.distances:
            used = distance or boundary_distance(height, width)
            self.used_distances.setdefault(distance, set()).add(used)
            counts = boundary_counts(prediction.cpu().numpy(), target.cpu().numpy(), labels.num_classes, used)
            self._add(self.boundary, (protocol, distance), np.asarray(counts))

    def _count_probabilities(self, tissue_map: Tensor, target: Tensor) -> None:
        """One class against the rest, over tissue pixels, probabilities scaled to sum to 1 over tissue."""
        labels = self.labels
        if not self.histograms:
            self.histograms = [BinaryHistogram() for _ in labels.tissue]
        counted = target < labels.num_tissue
        tissue = tissue_map[: labels.num_tissue, counted]
        tissue = tissue / tissue.sum(0, keepdim=True).clamp_min(1e-8)
        truth = target[counted]
        self.calibration.update(tissue, truth)
        for index, histogram in enumerate(self.histograms):
            histogram.update(tissue[index].clamp(0, 1), (truth == index).to(torch.uint8))

    @staticmethod
    def _add(table: dict[Any, NDArray[np.int64]], key: Any, counts: NDArray[np.int64]) -> None:
        table[key] = counts if key not in table else table[key] + counts


def score_split(
    records: Sequence[Record],
    labels: LabelSpace,
    tissue_map_of: TissueMapOf,
    *,
    protocols: Sequence[Protocol],
    distances: Sequence[int] = (),
    truth_of: MaskOf | None = None,
    progress: str | None = None,
) -> SplitScores:
    """Score all records, each process its share; every process returns the sum.

    Args:
        records: images with masks.
        labels: the classes.
        tissue_map_of: from a record to its (K,H,W) map.
        protocols: what happens at white pixels; only the first counts where the label space has no white.
        distances: further boundary widths in pixels.
        truth_of: from a record to its (H,W) truth; None reads its mask.
        progress: text of a progress bar, or None.
    """
    used = protocols if labels.white is not None else protocols[:1]
    mine = SplitScores(labels, tuple(used), (0, *distances))
    for record in track(share(records), progress):
        truth = record.read_mask(labels) if truth_of is None else truth_of(record)
        mine.update(tissue_map_of(record), truth)
    first, *others = gather(mine)
    for other in others:
        first.merge(other)
    return first


def track(items: Sequence[Any], text: str | None) -> Any:
    """Iterate with a progress bar, or without where ``text`` is None."""
    if text is None:
        return items
    from rich.progress import track as bar

    return bar(items, description=text, transient=True)


def _named(names: Sequence[str], values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=False)}
