"""k-fold cross-validation: all images of a data set dealt anew, patients kept whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from tissuehint.data.catalog.grouping import by_group, split_groups
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError

# four folds, the other images 4:1 in train and val: the evaluation of the CVM paper
PAPER_FOLDS = 4
PAPER_VALIDATION = 0.2
# so many groups, the largest ones, are exchanged between parts until that no longer helps; its cost is their square
_EXCHANGED = 512


class CrossValidation(BaseModel):
    """k-fold cross-validation, the protocol of the CVM paper by default.

    All images of train, val and test are joined and dealt into ``folds`` test folds; for each fold the other images
    are split into train and val. A group (``Record.group``: patient or case) is never in two parts.

    Args:
        folds: number of test folds.
        validation: share of the images outside the test fold that goes to val; 0 leaves val empty.
        seed: of the deal. It is not the seed of the training.
        fold: run this one alone, counted from 0; None runs all and summarises them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    folds: int = Field(default=PAPER_FOLDS, ge=2)
    validation: float = Field(default=PAPER_VALIDATION, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    fold: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _known_fold(self) -> CrossValidation:
        if self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} is none of {self.folds} folds, which count from 0 to {self.folds - 1}")
        return self


def deal_folds(records: Iterable[Record], folds: int, seed: int = 0) -> list[tuple[Record, ...]]:
    """Deal images into folds of about the same size.

    Groups are whole, and images with and without a mask are each shared out evenly (only those with one are scored).
    Without groups, and with masks for all or none, fold sizes differ by one at most; with groups by no more than the
    largest group. The seed decides among groups of the same size, so where all sizes differ it changes little.

    Args:
        records: images; their order plays no part.
        folds: at least 1.
        seed: the same seed gives the same folds.

    Returns:
        ``folds`` tuples of records, each sorted by id, that together hold every record once.

    Raises:
        InputError: fewer groups than folds.
    """
    groups = by_group(sorted(records, key=_id))
    if len(groups) < folds:
        rule = f"is more than the {len(groups)} patients, cases or single images, each of which is in one fold"
        fix = f"write folds: {len(groups)} or fewer" if len(groups) > 1 else "give images of two patients at least"
        raise InputError(f"recipe key cross_validation.folds = {folds}", rule, fix)
    return list(_deal(groups, {str(fold): 1.0 for fold in range(folds)}, [seed]).values())


def fold_dataset(dataset: TissueDataset, rules: CrossValidation) -> TissueDataset:
    """One fold of a data set as a data set of its own.

    Args:
        dataset: its train, val and test are joined.
        rules: with ``fold`` given.

    Returns:
        ``test`` is the fold; the rest is split into ``train`` and ``val``. Training images stand in drawn order, so
        that a limit on their number takes a fair sample. The notes say how the folds were made.

    Raises:
        InputError: fewer groups than folds.
        ValueError: ``rules.fold`` is None.
    """
    if rules.fold is None:
        raise ValueError("fold is None: say which fold")
    records = [record for split in dataset.splits.values() for record in split]
    tests = deal_folds(records, rules.folds, rules.seed)
    rest = by_group(record for index, test in enumerate(tests) if index != rules.fold for record in test)
    seeds = [rules.seed, 1 + rules.fold]
    shares = {"train": 1 - rules.validation, "val": rules.validation}
    parts = _deal(rest, {name: share for name, share in shares.items() if share}, seeds)
    train = parts["train"]
    order = np.random.default_rng([*seeds, 1]).permutation(len(train))
    splits = {"train": tuple(train[place] for place in order), "val": parts.get("val", ()), "test": tests[rules.fold]}
    notes = (*_notes(records, tests, rules), _counts(splits, rules), *dataset.notes)
    return replace(dataset, splits=splits, notes=notes)


def _deal(
    groups: Mapping[str, Sequence[Record]], shares: Mapping[str, float], seed: Sequence[int]
) -> dict[str, tuple[Record, ...]]:
    """Whole groups to parts that get their share of the images; each part sorted by id."""
    names = sorted(groups)
    drawn = np.random.default_rng(list(seed)).permutation(len(names))
    # split_groups knows no chance and breaks ties by name: the drawn names bring the seed in
    ranks = {f"{rank:09d}": names[place] for rank, place in enumerate(drawn)}
    kinds = {rank: Counter("mask" if record.mask is not None else "none" for record in groups[name])
             for rank, name in ranks.items()}  # fmt: skip
    ordered = sorted(ranks, key=lambda rank: (-kinds[rank].total(), rank))
    home = split_groups({rank: kinds[rank] for rank in ordered[:_EXCHANGED]}, shares)
    home |= _fill(home, kinds, ordered[_EXCHANGED:], shares)
    parts: dict[str, list[Record]] = {name: [] for name in shares}
    for rank, part in home.items():
        parts[part].extend(groups[ranks[rank]])
    return {name: tuple(sorted(part, key=_id)) for name, part in parts.items()}


def _fill(
    home: Mapping[str, str], kinds: Mapping[str, Counter[str]], later: Sequence[str], shares: Mapping[str, float]
) -> dict[str, str]:
    """Each later, smaller group to the part that lacks most of what it has."""
    columns = sorted({kind for counts in kinds.values() for kind in counts})
    rows = {rank: np.array([counts[kind] for kind in columns], np.float64) for rank, counts in kinds.items()}
    parts = list(shares)
    wish = np.array(list(shares.values()))[:, None] / sum(shares.values()) * sum(rows.values())
    lack = wish.copy()
    for rank, part in home.items():
        lack[parts.index(part)] -= rows[rank]
    found = {}
    for rank in later:
        change = (((lack - rows[rank]) ** 2 - lack**2) / wish).sum(1)
        place = int(change.argmin())
        lack[place] -= rows[rank]
        found[rank] = parts[place]
    return found


def _notes(records: Sequence[Record], tests: Sequence[Sequence[Record]], rules: CrossValidation) -> list[str]:
    """How the folds were made; the same for each of them."""
    named = {record.group for record in records if record.group}
    single = sum(not record.group for record in records)
    if not named:
        grouped = "no image names its patient or case, so each was dealt on its own"
    else:
        grouped = f"grouped by patient or case ({len(named)} of them, each in one part only)"
        grouped += f", {single} images without one on their own" if single else ""
    counts = ", ".join(str(len(test)) for test in tests)
    share = f"{rules.validation:.0%} of the images outside the test fold validate"
    return [
        f"cross-validation: all {len(records)} images dealt into {rules.folds} test folds of {counts} images, seed "
        f"{rules.seed}, {grouped}; {share}",
        "the official split is not used; where a line below speaks of a split or of patients in two splits, it does not"
        " hold for these folds",
    ]


def _counts(splits: Mapping[str, Sequence[Record]], rules: CrossValidation) -> str:
    counts = ", ".join(f"{name} {len(records)}" for name, records in splits.items())
    lacking = "" if splits["val"] or not rules.validation else " (too few patients or cases are left for val)"
    return f"fold {rules.fold} of 0 to {rules.folds - 1}: images dealt to {counts}{lacking}"


def _id(record: Record) -> str:
    return record.id
