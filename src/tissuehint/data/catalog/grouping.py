"""Splits that keep patients apart: whole groups go to one split, sizes and class mixture stay near the wish."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.catalog.base import SPLITS, Splits
from tissuehint.data.records import Record

# A stratum that is absent from a split although it has groups enough costs more than any deviation in size
_ABSENT = 1e3

_TCGA = re.compile(r"TCGA-[A-Za-z0-9]{2}-[A-Za-z0-9]{4}", re.IGNORECASE)


def tcga_patient(stem: str) -> str | None:
    """Patient of a TCGA file name, its first three fields.

    Example:
        >>> tcga_patient("TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500+0[1101]")
        'TCGA-A1-A0SK'
    """
    found = _TCGA.match(stem)
    return found.group().upper() if found else None


def by_group(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by their group; one without a group is a group of its own."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.group or record.id, []).append(record)
    return groups


def split_groups(strata: Mapping[str, Counter[str]], ratio: Mapping[str, float]) -> dict[str, str]:
    """Give every group to exactly one split, so that each stratum is shared out as ``ratio`` says.

    With n_sk the images of stratum k in split s, N_k all its images and r_s the wished share, it minimises
    sum_sk (n_sk - r_s N_k)^2 / (r_s N_k), plus a penalty for each stratum with at least as many groups as there are
    splits that is absent from a split. Large groups are placed first, then single moves and swaps are taken while
    they help. There is no chance in it: the same groups always give the same splits.

    Args:
        strata: for each group its number of images by stratum (grade, class).
        ratio: wished share of each split, in any unit.

    Returns:
        The split of each group. No split is empty if there are at least as many groups as splits; with fewer
        groups the first splits of ``ratio`` are filled.

    Example:
        >>> strata = {name: Counter({"benign": 1}) for name in "abcd"}
        >>> sorted(Counter(split_groups(strata, {"train": 3, "test": 1}).values()).items())
        [('test', 1), ('train', 3)]
    """
    names = list(ratio)
    groups = sorted(strata, key=lambda group: (-strata[group].total(), group))
    kinds = sorted({kind for counts in strata.values() for kind, count in counts.items() if count})
    vectors = np.array([[strata[group][kind] for kind in kinds] for group in groups], np.float64)
    if len(groups) <= len(names):
        return dict(zip(groups, names, strict=False))
    share = np.array(list(ratio.values()), np.float64)
    home = _improve(_place(vectors, share / share.sum()), vectors, share / share.sum())
    return {group: names[split] for group, split in zip(groups, home, strict=True)}


def assign(groups: Mapping[str, Sequence[Record]], home: Mapping[str, str]) -> Splits:
    """Records of the three splits, sorted by id, from the split of each group."""
    splits: dict[str, list[Record]] = {name: [] for name in SPLITS}
    for group, records in groups.items():
        splits[home[group]].extend(records)
    return {name: tuple(sorted(records, key=lambda record: record.id)) for name, records in splits.items()}


def _cost(home: NDArray[np.int64], vectors: NDArray[np.float64], share: NDArray[np.float64]) -> float:
    counts = np.zeros((len(share), vectors.shape[1]))
    np.add.at(counts, home, vectors)
    wish = share[:, None] * vectors.sum(0)
    enough = (vectors > 0).sum(0) >= len(share)
    empty = len(share) - len(np.unique(home))
    return float(((counts - wish) ** 2 / wish).sum() + _ABSENT * ((counts == 0) & enough).sum() + _ABSENT**2 * empty)


def _place(vectors: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.int64]:
    """Each group, in the given order, to the split that lacks most of what it has."""
    wish = share[:, None] * vectors.sum(0)
    counts = np.zeros_like(wish)
    home = np.zeros(len(vectors), np.int64)
    for index, vector in enumerate(vectors):
        after = ((counts + vector - wish) ** 2 - (counts - wish) ** 2) / wish
        home[index] = int(after.sum(1).argmin())
        counts[home[index]] += vector
    return home


def _improve(
    home: NDArray[np.int64], vectors: NDArray[np.float64], share: NDArray[np.float64], rounds: int = 20
) -> NDArray[np.int64]:
    """Take moves of one group, and swaps of two where there are few groups, as long as one helps."""
    best = _cost(home, vectors, share)
    for _ in range(rounds):
        before = best
        for trial in _neighbours(home, len(share)):
            cost = _cost(trial, vectors, share)
            if cost < best - 1e-9:
                home[:], best = trial, cost
        if best >= before - 1e-9:
            break
    return home


def _neighbours(home: NDArray[np.int64], splits: int) -> Iterable[NDArray[np.int64]]:
    for index in range(len(home)):
        for split in range(splits):
            if split != home[index]:
                trial = home.copy()
                trial[index] = split
                yield trial
    if len(home) > 64:  # swaps grow with the square; many groups balance by single moves
        return
    for first in range(len(home)):
        for second in range(first):
            if home[first] != home[second]:
                trial = home.copy()
                trial[[first, second]] = trial[[second, first]]
                yield trial
