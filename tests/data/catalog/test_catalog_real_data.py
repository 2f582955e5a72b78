"""Counts and patients on the real releases, where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

from tissuehint.data import catalog
from tissuehint.data.records import TissueDataset


def real(name: str) -> Path:
    folder = os.environ.get("TISSUEHINT_DATA")
    if not folder:
        pytest.skip("TISSUEHINT_DATA is not set: no real data at hand")
    if not (Path(folder) / name).is_dir():
        pytest.skip(f"TISSUEHINT_DATA has no folder {name}")
    return Path(folder) / name


def counts(dataset: TissueDataset) -> tuple[int, ...]:
    return tuple(len(dataset.splits[name]) for name in ("train", "val", "test"))


def groups(dataset: TissueDataset) -> list[set[str | None]]:
    return [{record.group for record in dataset.splits[name]} for name in ("train", "val", "test")]


def assert_apart(dataset: TissueDataset) -> None:
    train, val, test = groups(dataset)
    assert None not in train | val | test
    assert not train & val
    assert not (train | val) & test


def assert_readable(dataset: TissueDataset) -> None:
    """A few masks of each split have known classes and the size of their image."""
    for records in dataset.splits.values():
        for record in [record for record in records if record.mask is not None][:: max(1, len(records) // 4)]:
            mask = record.read_mask(dataset.labels)
            assert mask.shape == record.read_image().shape[:2]


def test_glas_paper():
    dataset = catalog.read("glas", real("glas"))
    assert counts(dataset)[:2] == (70, 15)
    assert counts(dataset)[2] in (60, 80)
    assert {record.id for record in dataset.splits["val"]} == {f"train_{number}" for number in range(71, 86)}
    assert any("also in train" in note for note in dataset.notes)
    assert_readable(dataset)


def test_glas_patient():
    dataset = catalog.read("glas", real("glas"), "patient")
    assert_apart(dataset)
    total = sum(counts(dataset))
    assert total == sum(counts(catalog.read("glas", real("glas"))))
    for count, wish in zip(counts(dataset), (70, 15, 80), strict=True):
        assert abs(count / total - wish / 165) < 0.06


@pytest.mark.parametrize("scheme", ["case", "gland_paper"])
def test_ebhi_keeps_cases_apart(scheme):
    dataset = catalog.read("ebhi_seg", real("ebhi-seg"), scheme)
    assert_apart(dataset)
    assert_readable(dataset)
    share = np.mean(np.concatenate([record.read_mask(dataset.labels).ravel() for record in dataset.splits["val"][:20]]))
    assert 0.2 < share < 0.95


def test_ebhi_totals():
    dataset = catalog.read("ebhi_seg", real("ebhi-seg"))
    train, val, test = counts(dataset)
    left_out = 2  # the training cases GTXC2014134 and GTXC2014183, in test as GTxc2014134 and GTxc2014183
    assert train + val == 1330 - left_out
    assert test == 449
    assert abs(val / (train + val) - 1 / 8) < 0.01


def test_wsss4luad_official():
    dataset = catalog.read("wsss4luad", real("wsss4luad"))
    assert counts(dataset) == (4, 31, 34)
    assert sorted(tuple(record.tags.values) for record in dataset.splits["train"]) == [
        (0, 0, 1),
        (0, 1, 0),
        (1, 0, 0),
        (1, 1, 0),
    ]
    assert_readable(dataset)


def test_wsss4luad_regions_hold_every_class():
    dataset = catalog.read("wsss4luad", real("wsss4luad"), "regions")
    assert counts(dataset)[2] == 34
    assert sum(counts(dataset)[:2]) == 31
    for split in ("train", "val"):
        present = set()
        for record in dataset.splits[split]:
            present |= set(np.unique(record.read_mask(dataset.labels)).tolist())
        assert present == {0, 1, 2, 3}
