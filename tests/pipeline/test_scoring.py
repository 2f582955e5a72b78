import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tissuehint.metrics
from tissuehint.labels import LabelSpace
from tissuehint.pipeline.scoring import SplitScores, score_split
from tissuehint.pipeline.stages import pseudo_mask, weak_full_ratio
from tissuehint.testing.fakes import fake_dataset, fake_labels

WHITE = LabelSpace(("a", "b", "c", "white"), white=3)
PLAIN = LabelSpace(("a", "b", "c"))
PROTOCOLS = ("ignore_white", "fp_on_white", "five_class")


def images(labels, count, seed, ignore=0.1):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        height, width = generator.integers(8, 30, 2)
        maps = torch.from_numpy(generator.random((labels.num_classes, height, width))).float()
        mask = generator.integers(0, labels.num_classes, (height, width)).astype(np.uint8)
        mask[generator.random((height, width)) < ignore] = 255
        yield maps / maps.sum(0), mask


def count(labels, pairs):
    scores = SplitScores(labels, PROTOCOLS if labels.white is not None else PROTOCOLS[:1], (0, 2))
    for maps, mask in pairs:
        scores.update(maps, mask)
    return scores


@settings(max_examples=15)
@given(seed=st.integers(0, 999), cut=st.integers(0, 5), white=st.booleans())
def test_parts_together_are_the_whole(seed, cut, white):
    labels = WHITE if white else PLAIN
    pairs = list(images(labels, 5, seed))
    whole = count(labels, pairs).rows(stage="x")
    first = count(labels, pairs[:cut])
    first.merge(count(labels, pairs[cut:]))
    assert len(first.rows(stage="x")) == len(whole)
    for mine, theirs in zip(first.rows(stage="x"), whole, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == (value if isinstance(value, str) else pytest.approx(value, nan_ok=True)), key


def test_merging_leaves_the_other_part_as_it_was():
    one, other, third = (count(WHITE, images(WHITE, 2, seed)) for seed in range(3))
    before = other.rows()
    empty = SplitScores(WHITE, PROTOCOLS, (0, 2))
    for part in (other, one, third):
        empty.merge(part)
    assert str(other.rows()) == str(before)


def test_rows_are_the_scores_of_all_pixels_together():
    pairs = list(images(WHITE, 6, 7))
    rows = {row["protocol"]: row for row in count(WHITE, pairs).rows()}
    truth = torch.cat([torch.from_numpy(mask).flatten() for _, mask in pairs])
    tissue = torch.cat([maps[:3].argmax(0).flatten() for maps, _ in pairs]).to(torch.uint8)
    five = torch.cat([maps.argmax(0).flatten() for maps, _ in pairs]).to(torch.uint8)
    # A: white truth is left out like ignored pixels, prediction among tissue
    without_white = torch.where(truth == 3, 255, truth).to(torch.uint8)
    expected = tissuehint.metrics.scores(tissuehint.metrics.confusion_matrix(tissue, without_white, 3))
    for key in ("miou", "fwiou", "dice_mean", "dice_from_miou", "accuracy"):
        assert rows["ignore_white"][key] == pytest.approx(float(expected[key])), key
    assert list(rows["ignore_white"]["iou"].values()) == pytest.approx([float(value) for value in expected["iou"]])
    # B and C: IoU of each tissue class over all labelled pixels, by hand
    for protocol, prediction in (("fp_on_white", tissue), ("five_class", five)):
        counted = truth != 255
        for index, name in enumerate("abc"):
            hit, said, true = ((prediction == index) & (truth == index), prediction == index, truth == index)
            union = ((said | true) & counted).sum()
            assert rows[protocol]["iou"][name] == pytest.approx(float((hit & counted).sum() / union))


def test_without_white_there_is_one_row():
    data = fake_dataset(fake_labels(white=False), count=(1, 0, 3))
    maps = torch.full((3, 64, 64), 1 / 3)
    rows = score_split(data.splits["test"], data.labels, lambda record: maps, protocols=PROTOCOLS).rows()
    assert [row["protocol"] for row in rows] == ["ignore_white"]
    assert rows[0]["images"] == 3


def test_perfect_maps_score_one():
    data = fake_dataset(fake_labels(), count=(1, 0, 6))

    def perfect(record):
        mask = torch.from_numpy(record.read_mask(data.labels))
        return torch.stack([mask == index for index in range(4)]).float()

    rows = {
        row["protocol"]: row
        for row in score_split(data.splits["test"], data.labels, perfect, protocols=PROTOCOLS).rows()
    }
    for protocol in ("ignore_white", "five_class"):
        for key in ("miou", "accuracy", "boundary_miou", "dice_mean"):
            assert rows[protocol][key] == pytest.approx(1), (protocol, key)
    assert rows["fp_on_white"]["miou"] < 1
    assert rows["ignore_white"]["proportion_w1"] == pytest.approx(0, abs=1e-6)
    assert set(rows["ignore_white"]["auc"].values()) == {1.0}


class TestPseudoMask:
    def test_pixels_without_any_probability_are_ignored(self):
        maps = torch.zeros(3, 2, 2)
        maps[1, 0, 0] = 1
        assert pseudo_mask(maps, 0.0, 255).tolist() == [[1, 255], [255, 255]]

    def test_unsure_pixels_are_ignored(self):
        maps = torch.tensor([[0.5, 0.7], [0.5, 0.3]])[:, None]
        assert pseudo_mask(maps, 0.6, 255).tolist() == [[255, 0]]
        assert pseudo_mask(maps, 0.5, 255).tolist() == [[0, 0]]


class TestRatio:
    def test_first_split_and_protocol(self):
        keys = ("miou", "dice_mean", "accuracy", "boundary_miou")
        rows = [
            {"stage": stage, "split": split, "protocol": "ignore_white", **dict.fromkeys(keys, value)}
            for split, stage, value in (("val", "stage2", 0.4), ("val", "ceiling", 0.8), ("test", "stage2", 0.1))
        ]
        ratio = weak_full_ratio(rows)
        assert ratio == {**dict.fromkeys(keys, 0.5), "split": "val", "protocol": "ignore_white"}

    def test_none_without_both(self):
        assert weak_full_ratio([{"stage": "stage2"}]) is None
        assert weak_full_ratio([]) is None
