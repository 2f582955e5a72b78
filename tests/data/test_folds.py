"""Folds of a data set: every image tested once, patients whole, sizes balanced."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tissuehint.data.folder import read_folder
from tissuehint.data.folds import CrossValidation, deal_folds, fold_dataset
from tissuehint.data.phantom import phantom_dataset, write_phantom
from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

IMAGE = np.zeros((2, 2, 3), np.uint8)
LABELS = LabelSpace(names=("a", "b"), colours=((255, 0, 0), (0, 255, 0)))
SPLITS = ("train", "val", "test")


def data(groups: list[str | None], masked: list[bool] | None = None) -> TissueDataset:
    """One image for each given group (None: without), dealt to the official splits in turn."""
    masks = [True] * len(groups) if masked is None else masked
    records = [
        Record(f"image_{place:04d}", IMAGE, IMAGE[..., 0] if masks[place] else None, group=group)
        for place, group in enumerate(groups)
    ]
    return TissueDataset("made", LABELS, {name: tuple(records[index::3]) for index, name in enumerate(SPLITS)})


def all_records(dataset: TissueDataset) -> list[Record]:
    return [record for split in dataset.splits.values() for record in split]


def parts_of(records: list[Record]) -> set[str]:
    return {record.group or record.id for record in records}


grouped = st.lists(st.one_of(st.none(), st.integers(0, 14).map("patient_{}".format)), min_size=2, max_size=60)


@settings(max_examples=60)
@given(groups=grouped, folds=st.integers(2, 6), seed=st.integers(0, 3))
def test_every_image_is_tested_once_and_no_group_is_in_two_parts(groups, folds, seed):
    dataset = data(groups)
    everything = all_records(dataset)
    assume(len(parts_of(everything)) >= folds)
    largest = max(Counter(record.group or record.id for record in everything).values())
    tested: Counter[str] = Counter()
    sizes = []
    for fold in range(folds):
        splits = fold_dataset(dataset, CrossValidation(folds=folds, seed=seed, fold=fold)).splits
        ids = sorted(record.id for split in splits.values() for record in split)
        assert ids == sorted(record.id for record in everything)
        groups_of = {name: parts_of(list(records)) for name, records in splits.items()}
        for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not groups_of[first] & groups_of[second]
        assert splits["train"]
        assert splits["test"]
        tested.update(record.id for record in splits["test"])
        sizes.append(len(splits["test"]))
        rest = len(everything) - sizes[-1]
        assert abs(len(splits["val"]) - 0.2 * rest) <= largest
    assert tested == Counter(record.id for record in everything)
    assert max(sizes) - min(sizes) <= largest


@settings(max_examples=30)
@given(count=st.integers(5, 700), folds=st.integers(2, 5))
def test_images_without_groups_are_dealt_evenly(count, folds):
    tests = deal_folds(all_records(data([None] * count)), folds)
    sizes = [len(test) for test in tests]
    assert max(sizes) - min(sizes) <= 1
    splits = fold_dataset(data([None] * count), CrossValidation(folds=folds, fold=0)).splits
    assert abs(len(splits["val"]) - 0.2 * (count - len(splits["test"]))) <= 1


def test_very_many_groups_are_dealt_evenly_and_at_once():
    groups = [f"case_{place % 1900}" for place in range(4000)]
    sizes = [len(test) for test in deal_folds(all_records(data(groups)), 4)]
    assert max(sizes) - min(sizes) <= 1


def test_the_seed_alone_decides():
    dataset = data([f"patient_{place // 2}" for place in range(40)])
    shuffled = replace(dataset, splits={"train": tuple(reversed(all_records(dataset))), "val": (), "test": ()})
    rules = CrossValidation(fold=1, seed=5)
    first, again = fold_dataset(dataset, rules).splits, fold_dataset(shuffled, rules).splits
    for name in SPLITS:
        assert [record.id for record in first[name]] == [record.id for record in again[name]]
    other = fold_dataset(dataset, CrossValidation(fold=1, seed=6)).splits
    assert {record.id for record in first["test"]} != {record.id for record in other["test"]}
    assert {record.id for record in first["val"]} != {record.id for record in other["val"]}


def test_images_with_masks_are_shared_out_evenly():
    dataset = data([None] * 40, masked=[place % 5 == 0 for place in range(40)])
    for test in deal_folds(all_records(dataset), 4):
        assert sum(record.mask is not None for record in test) == 2
    splits = fold_dataset(dataset, CrossValidation(fold=2)).splits
    assert sum(record.mask is not None for record in splits["val"]) in (1, 2)


def test_training_images_stand_in_drawn_order_so_that_a_limit_takes_a_fair_sample():
    train = [record.id for record in fold_dataset(data([None] * 60), CrossValidation(fold=0)).splits["train"]]
    assert train != sorted(train)
    assert np.corrcoef(np.arange(len(train)), np.argsort(np.argsort(train)))[0, 1] < 0.5


def test_share_of_validation():
    dataset = data([None] * 40)
    assert len(fold_dataset(dataset, CrossValidation(fold=0, validation=0.5)).splits["val"]) == 15
    assert fold_dataset(dataset, CrossValidation(fold=0, validation=0)).splits["val"] == ()


def test_the_notes_say_how_the_folds_were_made():
    dataset = replace(data(["p", "p", "q", "q", None, None, None, None]), notes=("subset",))
    notes = fold_dataset(dataset, CrossValidation(folds=2, seed=7, fold=1)).notes
    assert notes[-1] == "subset"
    for words in ("all 8 images", "2 test folds of 4, 4 images", "seed 7", "patient or case (2 of them", "4 images"):
        assert words in notes[0]
    assert "official split is not used" in notes[1]
    assert notes[2] == "fold 1 of 0 to 1: images dealt to train 3, val 1, test 4"
    single = fold_dataset(data([None] * 8), CrossValidation(folds=2, fold=0)).notes
    assert "each was dealt on its own" in single[0]


def test_too_few_patients_for_val_is_said():
    dataset = fold_dataset(data(["p", "q"] * 4), CrossValidation(folds=2, fold=0))
    assert dataset.splits["val"] == ()
    assert any("too few patients" in note for note in dataset.notes)


@pytest.mark.parametrize(("groups", "fix"), [(["p", "q"] * 9, "2 or fewer"), (["p"] * 9, "two patients")])
def test_fewer_groups_than_folds_are_refused(groups, fix):
    with pytest.raises(InputError, match=r"cross_validation\.folds = 3.*" + fix):
        fold_dataset(data(groups), CrossValidation(folds=3, fold=0))


def test_rules_out_of_range():
    for wrong in ({"folds": 1}, {"folds": 3, "fold": 3}, {"validation": 1.0}, {"fold": -1}, {"seed": -1}):
        with pytest.raises(ValueError, match="validation error"):
            CrossValidation(**wrong)
    with pytest.raises(ValueError, match="which fold"):
        fold_dataset(data([None] * 4), CrossValidation())


def test_a_data_folder_and_the_same_tissue_in_memory_have_the_same_folds(tmp_path):
    write_phantom(tmp_path / "tissue", count=(12, 4, 4), size=64)
    written, made = read_folder(tmp_path / "tissue"), phantom_dataset((12, 4, 4), 64)
    for fold in range(2):
        rules = CrossValidation(folds=2, fold=fold)
        first, second = fold_dataset(written, rules).splits, fold_dataset(made, rules).splits
        for name in SPLITS:
            assert [record.id for record in first[name]] == [record.id for record in second[name]]
