"""The image bank: who gets in, what the prototypes are, what is kept on disk, and how well it tells tissues apart."""

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import f1_score

from tissuehint.data.module import DataConfig, TissueData
from tissuehint.data.records import Record, TissueDataset
from tissuehint.data.training_sets import to_tensor
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Tags
from tissuehint.methods.pbip import PBIP, Bank, BankConfig, PBIPConfig, bank_files, build_bank, features, score
from tissuehint.methods.pbip.bank import purest, single_tags
from tissuehint.methods.pbip.bank_files import load_or_build, read_bank
from tissuehint.methods.pbip.score import classify, score_bank, scores_of
from tissuehint.nn.image_encoders import ImageEncoderConfig, RandomEncoderWarning, build_image_encoder
from tissuehint.testing import fake_dataset, fake_labels
from tissuehint.testing.contract import unreadable_masks
from tissuehint.testing.fakes import fake_data

LABELS = LabelSpace(("tumour", "stroma", "necrosis", "white"), white=3)
COLOURS = np.array([(150, 50, 120), (60, 70, 160), (190, 120, 150)])
FROZEN = {"name": "test_resnet", "side": 32}


def encoder_of(**changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomEncoderWarning)
        return build_image_encoder(ImageEncoderConfig(**{**FROZEN, **changes}))


@pytest.fixture(scope="module")
def encoder():
    return encoder_of()


def picture(seed, *tissues, white_rows=0, height=64, width=64):
    """Stripes of the tissues in four very different textures, and ``white_rows`` rows of white below."""
    generator = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    period = (2, 5, 9, 17)[seed % 4]
    waves = 40 * np.sin((rows * (seed % 2) + columns) * 2 * np.pi / period)
    which = np.asarray(tissues)[columns * len(tissues) // width]
    image = COLOURS[which] + waves[..., None] + generator.normal(0, 8, (height, width, 3))
    image = np.clip(image, 0, 199)
    image[height - white_rows :] = 255
    return image.astype(np.uint8)


def record(name, seed, *tissues, mask=True, **size):
    image = picture(seed, *tissues, **size)
    truth = np.zeros(image.shape[:2], np.uint8)  # a lie: whoever reads it learns that all is tumour
    return Record(name, image, truth if mask else None, Tags([int(each in tissues) for each in range(3)]))


def records(number=7):
    """``number`` patches of each class by itself, two of mixed ones, one without any tag."""
    found = [record(f"single_{tissue}_{n}", 10 * tissue + n, tissue) for tissue in range(3) for n in range(number)]
    found += [record("pair", 50, 0, 1), record("triple", 51, 0, 1, 2)]
    return [*found, replace(record("none", 52, 0), tags=Tags([0, 0, 0]))]


def items_of(found, labels=LABELS, *, test=(), config=None):
    dataset = TissueDataset("bank", labels, {"train": tuple(found), "val": (), "test": tuple(test)})
    return TissueData(dataset, config or DataConfig(source="fake", workers=0)).hints("train", "tags")


def unit_features(encoder, images):
    """(M,D) float64, each image encoded by itself."""
    with torch.no_grad():
        vectors = torch.cat([encoder(to_tensor(image)[None]) for image in images]).double().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def members(bank):
    """Of each sub-class the set of its images, under ``selection: all``."""
    return [set(each.images) for each in bank.sub_classes]


def refused(call, *words):
    with pytest.raises(InputError) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    assert raised.value.subject
    assert raised.value.rule
    assert raised.value.fix
    for word in words:
        assert word in text, text


class TestCandidates:
    def test_they_are_the_patches_with_one_tag(self, encoder):
        found = records()
        bank = build_bank(items_of(found), LABELS, BankConfig(selection="all"), encoder)
        assert bank.candidates == (7, 7, 7)
        assert bank.counts == (3, 3, 3)
        for tissue, name in enumerate(LABELS.tissue):
            parts = [each for each in bank.sub_classes if each.tissue == name]
            assert [each.number for each in parts] == [1, 2, 3]
            taken = [image for each in parts for image in each.images]
            assert sorted(taken) == [f"single_{tissue}_{n}" for n in range(7)]
            assert [each.members for each in parts] == [len(each.images) for each in parts]
            assert sorted((each.members for each in parts), reverse=True) == [each.members for each in parts]

    @pytest.mark.parametrize(("rows", "limit", "kept"), [(16, 0.25, True), (17, 0.25, False), (64, 1, True), (1, 0, 0)])
    def test_too_white_ones_are_left_out(self, encoder, rows, limit, kept):
        found = [*records(2), record("pale", 1, 1, white_rows=rows)]
        config = BankConfig(prototypes_per_class=1, selection="all", max_white=limit)
        bank = build_bank(items_of(found), LABELS, config, encoder)
        assert ("pale" in bank.sub_classes[1].images) == kept
        assert bank.candidates == (2, 2 + bool(kept), 2)

    def test_white_begins_above_the_threshold(self, encoder):
        grey = replace(record("grey", 1, 1), image=np.full((64, 64, 3), 200, np.uint8))
        for threshold, kept in ((200, True), (199, False)):
            config = BankConfig(prototypes_per_class=1, selection="all", white_threshold=threshold, max_white=0)
            found = [record(f"single_{n}", n, n) for n in range(3)]
            bank = build_bank(items_of([*found, grey]), LABELS, config, encoder)
            assert ("grey" in bank.sub_classes[1].images) == kept

    def test_no_mask_is_read(self, encoder):
        items = items_of(records(2))
        config = BankConfig(prototypes_per_class=1)
        with unreadable_masks():
            bank = build_bank(items, LABELS, config, encoder)
        bare = items_of([replace(each, mask=None) for each in records(2)])
        assert torch.equal(build_bank(bare, LABELS, config, encoder).prototypes, bank.prototypes)

    def test_windows_of_large_images_count_each_for_itself(self, encoder):
        labels = fake_labels()
        dataset = fake_dataset(labels, count=(9, 0, 0))
        grid = {"side": 32, "stride": 32, "presence": 0.1}
        data = TissueData(dataset, DataConfig(source="fake", workers=0, patches=grid))
        config = BankConfig(prototypes_per_class=1, selection="all", max_white=0.3)
        bank = build_bank(data.hints("train", "tags"), labels, config, encoder)
        expected: dict[int, dict[str, np.ndarray]] = {0: {}, 1: {}, 2: {}}
        for each in dataset.splits["train"]:
            for top in (0, 32):
                for left in (0, 32):
                    window = each.image[top : top + 32, left : left + 32]
                    tissue = int(each.mask[top, left])  # halves and white bands lie on the borders of windows
                    if (window.mean(2) > 220).mean() <= 0.3:
                        expected[tissue][f"{each.id}_{top}_{left}"] = window
        assert sum(map(len, expected.values())) < 36
        for tissue, part in enumerate(bank.sub_classes):
            assert set(part.images) == set(expected[tissue])
            unit = unit_features(encoder, list(expected[tissue].values()))
            mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
            np.testing.assert_allclose(bank.prototypes[tissue].numpy(), mean, atol=1e-5)

    def test_single_tags(self):
        tags = np.array([[0, 1, 0], [1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]], np.uint8)
        assert single_tags(tags).tolist() == [1, -1, -1, -1, 0, 2]


class TestPrototypes:
    @pytest.mark.parametrize("number", [1, 2, 100])
    @pytest.mark.parametrize("counts", [3, (2, 1, 4)])
    def test_they_are_means_of_the_images_nearest_to_each_centre(self, encoder, counts, number, monkeypatch):
        """Clusters from ``all``, everything else from the images, in double precision."""
        monkeypatch.setattr(features, "BATCH", 4)
        found = records()
        config = BankConfig(prototypes_per_class=counts, selection="all")
        clusters = members(build_bank(items_of(found), LABELS, config, encoder))
        bank = build_bank(
            items_of(found),
            LABELS,
            config.model_copy(update={"selection": "nearest", "images_per_prototype": number}),
            encoder,
        )
        images = {each.id: each.image for each in found}
        assert bank.counts == ((counts,) * 3 if isinstance(counts, int) else counts)
        assert bank.prototypes.shape == (sum(bank.counts), encoder.dim)
        assert bank.prototypes.dtype == torch.float32
        for place, (cluster, part) in enumerate(zip(clusters, bank.sub_classes, strict=True)):
            names = sorted(cluster)
            unit = unit_features(encoder, [images[name] for name in names])
            centre = unit.sum(0) / np.linalg.norm(unit.sum(0))
            cosine = dict(zip(names, unit @ centre, strict=True))
            assert part.members == len(names)
            assert len(part.images) == min(number, len(names))
            shown = [cosine[name] for name in part.images]
            np.testing.assert_allclose(shown, sorted(cosine.values(), reverse=True)[: len(shown)], atol=1e-6)
            np.testing.assert_allclose(part.similarity, shown, atol=1e-4)
            kept = unit_features(encoder, [images[name] for name in part.images]).mean(0)
            prototype = bank.prototypes[place].double().numpy()
            np.testing.assert_allclose(prototype, kept / np.linalg.norm(kept), atol=1e-5)
            assert np.linalg.norm(prototype) == pytest.approx(1, abs=1e-6)

    def test_every_patch_is_in_the_cluster_with_the_nearest_centre(self, encoder):
        found = records(9)
        bank = build_bank(items_of(found), LABELS, BankConfig(selection="all"), encoder)
        images = {each.id: each.image for each in found}
        for tissue in range(3):
            clusters = members(bank)[3 * tissue : 3 * tissue + 3]
            unit = [unit_features(encoder, [images[name] for name in sorted(each)]) for each in clusters]
            centres = np.stack([each.sum(0) / np.linalg.norm(each.sum(0)) for each in unit])
            for number, each in enumerate(unit):
                cosines = each @ centres.T
                assert (cosines[:, number] >= cosines.max(1) - 1e-6).all()

    def test_one_prototype_is_the_mean_of_the_class(self, encoder):
        found = records(5)
        bank = build_bank(items_of(found), LABELS, BankConfig(prototypes_per_class=1), encoder)
        for tissue in range(3):
            unit = unit_features(encoder, [each.image for each in found[5 * tissue : 5 * tissue + 5]])
            mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
            np.testing.assert_allclose(bank.prototypes[tissue].numpy(), mean, atol=1e-5)

    def test_random_images_are_of_the_cluster_and_follow_the_seed(self, encoder):
        items = items_of(records(12))
        config = BankConfig(prototypes_per_class=1, images_per_prototype=4, selection="random")
        banks = [build_bank(items, LABELS, config.model_copy(update={"seed": seed}), encoder) for seed in (0, 0, 1, 2)]
        nearest = build_bank(items, LABELS, config.model_copy(update={"selection": "nearest"}), encoder)
        everything = build_bank(items, LABELS, config.model_copy(update={"selection": "all"}), encoder)
        assert banks[0].to_dict() == banks[1].to_dict()
        assert torch.equal(banks[0].prototypes, banks[1].prototypes)
        drawn = [bank.sub_classes[0].images for bank in banks]
        assert len({*drawn, nearest.sub_classes[0].images}) > 2
        for bank in banks:
            for part, whole in zip(bank.sub_classes, everything.sub_classes, strict=True):
                assert len(set(part.images)) == 4
                assert set(part.images) < set(whole.images)
                assert part.members == 12
                assert list(part.similarity) == sorted(part.similarity, reverse=True)

    def test_a_class_with_few_patches_gives_all_of_them(self, encoder):
        for selection in ("nearest", "random", "all"):
            config = BankConfig(prototypes_per_class=2, images_per_prototype=50, selection=selection)
            bank = build_bank(items_of(records(3)), LABELS, config, encoder)
            assert [part.members for part in bank.sub_classes] == [2, 1] * 3
            assert [len(part.images) for part in bank.sub_classes] == [2, 1] * 3

    def test_equal_images_are_clustered_too(self, encoder):
        same = [replace(record(f"same_{n}", 3, 0), image=picture(3, 0)) for n in range(4)]
        found = [*same, *(each for each in records(3) if not each.id.startswith("single_0"))]
        bank = build_bank(items_of(found), LABELS, BankConfig(), encoder)
        assert bank.prototypes.isfinite().all()
        assert [part.members for part in bank.sub_classes[:3]] == [2, 1, 1]

    @pytest.mark.parametrize("selection", ["nearest", "random", "all"])
    def test_the_order_of_the_patches_does_not_matter(self, encoder, selection):
        found = records()
        config = BankConfig(images_per_prototype=2, selection=selection)
        one = build_bank(items_of(found), LABELS, config, encoder)
        mixed = [found[place] for place in np.random.default_rng(1).permutation(len(found))]
        for other in (found[::-1], mixed):
            items = items_of(other)
            two = build_bank(items, LABELS, config, encoder)
            torch.testing.assert_close(two.prototypes, one.prototypes, atol=1e-6, rtol=0)
            assert [part.images for part in two.sub_classes] == [part.images for part in one.sub_classes]
            for part in two.sub_classes:
                assert tuple(items.sample(place).id for place in part.items) == part.images

    def test_images_of_any_size(self, encoder):
        found = [
            record(f"single_{tissue}_{n}", n, tissue, height=64 + 9 * n, width=33 * (n + 1))
            for tissue in range(3)
            for n in range(3)
        ]
        bank = build_bank(items_of(found), LABELS, BankConfig(prototypes_per_class=1), encoder)
        unit = unit_features(encoder, [each.image for each in found[:3]])
        np.testing.assert_allclose(bank.prototypes[0].numpy(), unit.mean(0) / np.linalg.norm(unit.mean(0)), atol=1e-5)

    def test_no_generator_of_the_user_is_touched(self, encoder):
        items = items_of(records(3))
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        build_bank(items, LABELS, BankConfig(selection="random"), encoder)
        assert torch.equal(torch.get_rng_state(), before)
        assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002


class TestErrors:
    def test_too_few_candidates(self, encoder):
        found = [each for each in records(4) if each.id not in ("single_1_0", "single_1_1")]
        refused(
            lambda: build_bank(items_of(found), LABELS, BankConfig(), encoder),
            "class stroma",
            "2 patches",
            "needs 3",
            "multi_tag_fallback: true",
            "prototypes_per_class",
        )

    def test_no_candidate_at_all(self, encoder):
        found = [record("pair", 1, 0, 1), record("other", 2, 1, 2)]
        refused(lambda: build_bank(items_of(found), LABELS, BankConfig(), encoder), "class tumour", "0 patches")

    def test_patches_that_are_all_too_white(self, encoder):
        found = [each for each in records(3) if not each.id.startswith("single_2")]
        found += [record(f"pale_{n}", n, 2, white_rows=40) for n in range(5)]
        refused(lambda: build_bank(items_of(found), LABELS, BankConfig(), encoder), "class necrosis", "30% white")

    @pytest.mark.parametrize("numbers", [(2,), (3, 3), (1, 2, 3, 4)])
    def test_a_list_of_another_length(self, encoder, numbers):
        config = BankConfig(prototypes_per_class=numbers)
        words = ("method.bank.prototypes_per_class", str(list(numbers)), "3 tissue classes", "tumour, stroma, necrosis")
        refused(lambda: build_bank(items_of(records(4)), LABELS, config, encoder), *words)
        refused(
            lambda: PBIP(PBIPConfig(encoder={"name": "test_resnet"}, image_encoder=FROZEN, bank=config), LABELS), *words
        )

    @pytest.mark.parametrize("value", [0, -1, [], [1, 0, 2], 1.5, "three"])
    def test_numbers_that_are_none(self, value):
        with pytest.raises(ValueError, match="prototypes_per_class"):
            BankConfig(prototypes_per_class=value)

    @pytest.mark.parametrize(
        "settings",
        [
            {"images_per_prototype": 0},
            {"selection": "best"},
            {"max_white": 1.1},
            {"max_white": -0.1},
            {"white_threshold": 256},
            {"restarts": 0},
            {"seed": -1},
            {"k": 3},
        ],
        ids=str,
    )
    def test_other_values(self, settings):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BankConfig(**settings)

    def test_no_tags(self, encoder):
        items = replace(items_of(records(3)), tags=None)
        refused(lambda: build_bank(items, LABELS, BankConfig(), encoder), "no tags")


class TestFallback:
    def mixed(self):
        """One patch of tumour alone, and nine with others: pairs in two mixtures and triples."""
        found = [each for each in records(4) if not each.id.startswith(("single_0", "pair", "triple"))]
        found += [record("single_0", 7, 0), record("triple_a", 60, 0, 1, 2), record("triple_b", 61, 1, 0, 2)]
        return found + [record(f"pair_{n}", 70 + n, *((0, 1) if n % 2 else (0, 2))) for n in range(5)]

    def purest_slowly(self, encoder, found):
        """Few tags first, then the smallest of the largest cosines to the means of the other tags' own patches."""
        singles = {
            tissue: unit_features(encoder, [each.image for each in found if each.id.startswith(f"single_{tissue}")])
            for tissue in range(3)
        }
        ranked = []
        for each in found:
            tags = np.flatnonzero(each.tags.values)
            if 0 not in tags or len(tags) < 2:
                continue
            (unit,) = unit_features(encoder, [each.image])
            means = [singles[tissue].mean(0) for tissue in tags if tissue != 0]
            ranked.append((len(tags), max(unit @ mean / np.linalg.norm(mean) for mean in means), each.id))
        return [name for *_, name in sorted(ranked)]

    @pytest.mark.parametrize(("number", "taken"), [(1, 2), (2, 3), (3, 5), (100, 7)])
    def test_it_takes_the_purest_and_says_so(self, encoder, number, taken):
        found = self.mixed()
        config = BankConfig(
            prototypes_per_class=2, images_per_prototype=number, multi_tag_fallback=True, selection="all"
        )
        bank = build_bank(items_of(found), LABELS, config, encoder)
        used = {image for part in bank.sub_classes[:2] for image in part.images}
        assert used == {"single_0", *self.purest_slowly(encoder, found)[:taken]}
        assert bank.candidates == (1 + taken, 4, 4)
        assert len(bank.notes) == 1
        assert "tumour" in bank.notes[0]
        assert "multi_tag_fallback" in bank.notes[0]

    def test_it_is_left_alone_where_it_is_not_needed(self, encoder):
        plain = build_bank(items_of(records()), LABELS, BankConfig(), encoder)
        allowed = build_bank(items_of(records()), LABELS, BankConfig(multi_tag_fallback=True), encoder)
        assert plain.to_dict() == allowed.to_dict()
        assert torch.equal(plain.prototypes, allowed.prototypes)
        assert not allowed.notes

    def test_patches_of_every_class_may_be_mixed(self, encoder):
        found = [record(f"pair_{n}", n, *((0, 1), (1, 2), (0, 2))[n % 3]) for n in range(9)]
        config = BankConfig(prototypes_per_class=2, multi_tag_fallback=True)
        bank = build_bank(items_of(found), LABELS, config, encoder)
        assert bank.candidates == (6, 6, 6)
        assert len(bank.notes) == 3

    def test_white_ones_do_not_help(self, encoder):
        found = [each for each in records(3) if not each.id.startswith(("single_0", "pair", "triple"))]
        found += [record("clean", 4, 0, 1), *(record(f"pale_{n}", n, 0, 1, white_rows=40) for n in range(5))]
        config = BankConfig(prototypes_per_class=2, multi_tag_fallback=True)
        refused(
            lambda: build_bank(items_of(found), LABELS, config, encoder),
            "class tumour",
            "0 patches",
            "needs 2",
            "1 more",
            "method.bank.prototypes_per_class",
        )
        one = build_bank(items_of(found), LABELS, config.model_copy(update={"prototypes_per_class": 1}), encoder)
        assert one.sub_classes[0].images == ("clean",)

    def test_purest_by_hand(self):
        east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        vectors = torch.stack([east, north, F.normalize(east + north, dim=0), north, -east])
        tags = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]], np.uint8)
        order = purest(vectors, [-north, 5 * east, torch.zeros(0)], tags, 0)
        # two tags: nothing known about class 2, then cosines 0, .7 and 1 with class 1; three tags last
        assert order.tolist() == [4, 1, 2, 0, 3]


@pytest.fixture
def built(monkeypatch):
    """How often a bank is built rather than read."""
    calls = []

    def counting(*words, **names):
        calls.append(words)
        return build_bank(*words, **names)

    monkeypatch.setattr(bank_files, "build_bank", counting)
    return calls


SMALL = BankConfig(prototypes_per_class=2, images_per_prototype=2)


class TestCache:
    def load(self, folder, encoder, found=None, config=SMALL, labels=LABELS, data=None):
        items = items_of(records(3) if found is None else found, labels, config=data)
        return load_or_build(folder, items, labels, config, encoder, "cpu")

    def test_the_second_call_reads(self, encoder, tmp_path, built, monkeypatch):
        folder = tmp_path / "stage1" / "prepared"
        first = self.load(folder, encoder)
        kept = {path.name: path.read_bytes() for path in folder.iterdir()}
        monkeypatch.setattr(type(encoder), "forward", lambda *_: pytest.fail("an image is encoded"))
        second = self.load(folder, encoder_of())
        assert len(built) == 1
        assert second.to_dict() == first.to_dict()
        assert torch.equal(second.prototypes, first.prototypes)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept
        found, digest = read_bank(folder)
        assert (found.to_dict(), len(digest)) == (first.to_dict(), 64)
        assert torch.equal(PBIP.read_bank(folder).prototypes, first.prototypes)

    def test_images_in_files_are_kept_too(self, encoder, tmp_path, built):
        found = in_files(tmp_path, records(3))
        first = self.load(tmp_path / "bank", encoder, found)
        assert self.load(tmp_path / "bank", encoder, found).to_dict() == first.to_dict()
        assert len(built) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"prototypes_per_class": 1},
            {"prototypes_per_class": (2, 1, 2)},
            {"images_per_prototype": 1},
            {"selection": "random"},
            {"max_white": 0.5},
            {"white_threshold": 210},
            {"multi_tag_fallback": True},
            {"seed": 1},
            {"restarts": 2},
        ],
        ids=str,
    )
    def test_another_setting_builds_anew(self, encoder, tmp_path, built, change):
        self.load(tmp_path, encoder)
        config = SMALL.model_copy(update=change)
        bank = self.load(tmp_path, encoder, config=config)
        assert len(built) == 2
        expected = build_bank(items_of(records(3)), LABELS, config, encoder)
        assert bank.to_dict() == expected.to_dict()
        assert read_bank(tmp_path)[0].to_dict() == expected.to_dict()
        self.load(tmp_path, encoder, config=config)
        assert len(built) == 2

    @pytest.mark.parametrize(
        "change", [{"seed": 1}, {"side": 48}, {"normalization": "unit"}, {"projection": 16}], ids=str
    )
    def test_another_encoder_builds_anew(self, encoder, tmp_path, built, change):
        first = self.load(tmp_path, encoder)
        second = self.load(tmp_path, encoder_of(**change))
        assert len(built) == 2
        assert first.prototypes.shape != second.prototypes.shape or not torch.allclose(
            first.prototypes, second.prototypes
        )

    CHANGES = {  # noqa: RUF012
        "tags": lambda found: [replace(found[0], tags=Tags([1, 1, 0])), *found[1:]],
        "image": lambda found: [replace(found[0], image=found[0].image // 2), *found[1:]],
        "one pixel": lambda found: [replace(found[0], image=one_pixel_more(found[0].image)), *found[1:]],
        "name": lambda found: [replace(found[0], id="renamed"), *found[1:]],
        "one less": lambda found: found[1:],
        "one more": lambda found: [*found, record("more", 99, 1)],
        "order": lambda found: found[::-1],
    }

    @pytest.mark.parametrize("change", CHANGES)
    def test_other_patches_build_anew(self, encoder, tmp_path, built, change):
        config = SMALL.model_copy(update={"prototypes_per_class": 1})
        self.load(tmp_path, encoder, records(3), config)
        changed = self.CHANGES[change](records(3))
        bank = self.load(tmp_path, encoder, changed, config)
        assert len(built) == 2
        items = items_of(changed)
        for part in bank.sub_classes:
            assert tuple(items.sample(place).id for place in part.items) == part.images

    def test_another_grid_or_other_names_build_anew(self, encoder, tmp_path, built):
        bare = [replace(each, mask=None) for each in records(3)[:9]]
        for number, grid in enumerate([None, {"side": 32, "stride": 32}, {"side": 32, "stride": 32, "resize": 48}]):
            data = DataConfig(source="fake", workers=0, patches=grid)
            self.load(tmp_path, encoder, bare, data=data)
            assert len(built) == number + 1
        self.load(
            tmp_path, encoder, bare, labels=LabelSpace(("stroma", "tumour", "necrosis", "white"), white=3), data=data
        )
        assert len(built) == 4

    def test_a_file_of_another_size_builds_anew(self, encoder, tmp_path, built):
        found = in_files(tmp_path, records(3))
        self.load(tmp_path / "bank", encoder, found)
        Image.fromarray(picture(77, 0, height=80)).save(found[0].image)
        self.load(tmp_path / "bank", encoder, found)
        assert len(built) == 2

    def test_a_file_with_other_pixels_builds_anew(self, encoder, tmp_path, built):
        found = in_files(tmp_path, records(3), suffix=".bmp")
        self.load(tmp_path / "bank", encoder, found)
        Image.fromarray(found[0].read_image() // 2).save(found[0].image)
        bank = self.load(tmp_path / "bank", encoder, found)
        expected = build_bank(items_of(found), LABELS, SMALL, encoder)
        torch.testing.assert_close(bank.prototypes, expected.prototypes)

    @pytest.mark.parametrize("name", ["bank.json", "bank.safetensors"])
    def test_a_part_of_a_bank_is_none(self, encoder, tmp_path, built, name):
        first = self.load(tmp_path, encoder)
        (tmp_path / name).unlink()
        assert read_bank(tmp_path) is None
        refused(lambda: PBIP.read_bank(tmp_path), "no image bank", "bank score")
        assert self.load(tmp_path, encoder).to_dict() == first.to_dict()
        assert len(built) == 2
        assert read_bank(tmp_path) is not None

    def test_no_folder_is_none(self, tmp_path):
        assert read_bank(tmp_path / "gone") is None
        refused(lambda: PBIP.read_bank(tmp_path / "gone"), "gone", "no image bank")

    DAMAGES = {  # noqa: RUF012
        "no json": lambda folder: (folder / "bank.json").write_text("{"),
        "no text": lambda folder: (folder / "bank.json").write_bytes(b"\xff\xfe\x00"),
        "a list": lambda folder: (folder / "bank.json").write_text("[]"),
        "empty": lambda folder: (folder / "bank.json").write_text("{}"),
        "no inputs": lambda folder: change_card(folder, lambda card: card.pop("inputs")),
        "no notes": lambda folder: change_card(folder, lambda card: card["bank"].pop("notes")),
        "unknown key": lambda folder: change_card(folder, lambda card: card["bank"]["sub_classes"][0].update(more=1)),
        "cut weights": lambda folder: cut(folder / "bank.safetensors"),
        "other weights": lambda folder: (folder / "bank.safetensors").write_bytes(b"PK" * 200),
        "no weights": lambda folder: (folder / "bank.safetensors").write_bytes(b""),
    }

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_bank_is_named(self, encoder, tmp_path, damage):
        self.load(tmp_path, encoder)
        self.DAMAGES[damage](tmp_path)
        refused(lambda: self.load(tmp_path, encoder), str(tmp_path / "bank.json"), "damaged", "delete the folder")
        refused(lambda: PBIP.read_bank(tmp_path), "damaged")

    LIES = {  # noqa: RUF012
        "text for a sub-class": lambda folder: change_card(folder, lambda card: card["bank"].update(sub_classes=["a"])),
        "fewer prototypes": lambda folder: fewer_prototypes(folder),
        "other counts": lambda folder: change_card(folder, lambda card: card["bank"].update(counts=[1, 1, 1])),
    }

    @pytest.mark.parametrize("lie", LIES)
    def test_a_bank_that_does_not_fit_together_is_named(self, encoder, tmp_path, lie):
        self.load(tmp_path, encoder)
        self.LIES[lie](tmp_path)
        refused(lambda: self.load(tmp_path, encoder), str(tmp_path / "bank.json"), "damaged")

    def test_an_error_leaves_nothing(self, encoder, tmp_path):
        folder = tmp_path / "prepared"
        refused(lambda: self.load(folder, encoder, config=BankConfig(prototypes_per_class=9)), "needs 9")
        assert not folder.exists()

    def test_an_error_leaves_an_earlier_bank_as_it_is(self, encoder, tmp_path):
        first = self.load(tmp_path, encoder)
        refused(lambda: self.load(tmp_path, encoder, config=BankConfig(prototypes_per_class=9)), "needs 9")
        assert read_bank(tmp_path)[0].to_dict() == first.to_dict()

    @pytest.mark.parametrize("place", ["safetensors.torch.save_file", "PIL.Image.Image.save"])
    def test_a_write_that_fails_leaves_no_bank_that_counts(self, encoder, tmp_path, built, monkeypatch, place):
        """Neither the new one nor the old one, whose files are partly gone."""
        self.load(tmp_path, encoder)
        other = SMALL.model_copy(update={"prototypes_per_class": 1})

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(place, full)
            with pytest.raises(OSError, match="No space left"):
                self.load(tmp_path, encoder, config=other)
        assert read_bank(tmp_path) is None
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
        assert self.load(tmp_path, encoder, config=other).counts == (1, 1, 1)
        assert len(built) == 3

    def test_what_is_read_is_what_was_written(self, encoder, tmp_path):
        found = [record(f"pair_{n}", n, *((0, 1), (1, 2), (0, 2))[n % 3]) for n in range(9)]
        config = SMALL.model_copy(update={"multi_tag_fallback": True})
        bank = self.load(tmp_path, encoder, found, config)
        again, _ = read_bank(tmp_path)
        assert bank.notes
        for name in (each.name for each in fields(Bank)):
            one, two = getattr(bank, name), getattr(again, name)
            assert type(one) is type(two), name
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, name
        written = bank.to_dict()
        assert json.loads(json.dumps(written))["sub_classes"][1]["images"] == list(bank.sub_classes[1].images)
        assert "prototypes" not in written


def in_files(folder, found, suffix=".png"):
    paths = []
    for each in found:
        path = folder / f"{each.id}{suffix}"
        Image.fromarray(each.image).save(path)
        paths.append(replace(each, image=path, mask=None))
    return paths


def one_pixel_more(image):
    image = image.copy()
    image[5, 5, 0] ^= 1
    return image


def change_card(folder, change):
    card = json.loads((folder / "bank.json").read_text())
    change(card)
    (folder / "bank.json").write_text(json.dumps(card))


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-40])


def fewer_prototypes(folder):
    from safetensors.torch import load_file, save_file

    path = str(folder / "bank.safetensors")
    vectors = load_file(path)
    save_file({**vectors, "prototypes": vectors["prototypes"][:-1].clone()}, path)


class TestPictures:
    def plain(self, number=15):
        """Patches of one colour each, so that a thumbnail says which patch it shows."""
        found = []
        for tissue in range(3):
            for n in range(number):
                colour = np.array([40 + 9 * n, 60 + 50 * tissue, 190 - 9 * n], np.uint8)
                image = np.broadcast_to(colour, (40, 90, 3)).copy()
                found.append(Record(f"t{tissue}_{n}", image, tags=Tags([int(each == tissue) for each in range(3)])))
        return found

    def test_every_sub_class_is_shown_nearest_first(self, encoder, tmp_path):
        found = self.plain()
        config = BankConfig(prototypes_per_class=(2, 1, 3), images_per_prototype=14)
        bank = load_or_build(tmp_path, items_of(found), LABELS, config, encoder, "cpu")
        shown = json.loads((tmp_path / "pictures.json").read_text())
        assert shown["title"] == "Image bank"
        assert "nearest" in shown["text"]
        assert str(max(len(part.images) for part in bank.sub_classes)) in shown["text"]
        assert [picture["file"] for picture in shown["pictures"]] == [f"bank_{n}.png" for n in range(3)]
        images = {each.id: each.image[0, 0] for each in found}
        for name, entry, candidates in zip(LABELS.tissue, shown["pictures"], bank.candidates, strict=True):
            parts = [part for part in bank.sub_classes if part.tissue == name]
            assert entry["caption"].startswith(f"{name}: {candidates} patches")
            for part in parts:
                assert f"{part.number}: {part.members}" in entry["caption"]
            sheet = np.asarray(Image.open(tmp_path / entry["file"]).convert("RGB")).astype(int)
            side, step = bank_files.THUMBNAIL, bank_files.THUMBNAIL + bank_files.GAP
            columns = max(min(len(part.images), bank_files.SHOWN) for part in parts)
            assert sheet.shape == (len(parts) * step - bank_files.GAP, columns * step - bank_files.GAP, 3)
            for row, part in enumerate(parts):
                for column in range(columns):
                    cell = sheet[row * step : row * step + side, column * step : column * step + side]
                    expected = images[part.images[column]] if column < len(part.images) else 255
                    assert np.abs(cell - expected).max() <= 1
        assert max(len(part.images) for part in bank.sub_classes) > bank_files.SHOWN

    def test_a_note_of_the_fallback_stands_beside_them(self, encoder, tmp_path):
        found = [record(f"pair_{n}", n, *((0, 1), (1, 2), (0, 2))[n % 3]) for n in range(9)]
        config = BankConfig(prototypes_per_class=1, multi_tag_fallback=True)
        bank = load_or_build(tmp_path, items_of(found), LABELS, config, encoder, "cpu")
        text = json.loads((tmp_path / "pictures.json").read_text())["text"]
        assert len(bank.notes) == 3
        assert all(note in text for note in bank.notes)


class TestZeroShot:
    def test_classify_against_loops(self):
        generator = torch.Generator().manual_seed(0)
        counts = (2, 4, 1)
        vectors, prototypes = torch.randn(60, 5, generator=generator), 3 * torch.randn(7, 5, generator=generator)
        classes = [0, 0, 1, 1, 1, 1, 2]
        answers = {True: [], False: []}
        for vector in vectors.double().numpy():
            cosines = [[], [], []]
            for number, prototype in zip(classes, prototypes.double().numpy(), strict=True):
                cosines[number].append(vector @ prototype / np.linalg.norm(vector) / np.linalg.norm(prototype))
            answers[False].append(int(np.argmax([np.mean(each) for each in cosines])))
            answers[True].append(int(np.argmax([np.max(each) for each in cosines])))
        assert classify(vectors, prototypes, counts).tolist() == answers[False]
        assert classify(vectors, prototypes, counts, nearest=True).tolist() == answers[True]
        assert answers[True] != answers[False]

    @pytest.mark.parametrize("nearest", [False, True])
    def test_scores_against_sklearn(self, encoder, nearest, monkeypatch):
        monkeypatch.setattr(features, "BATCH", 7)
        bank = build_bank(items_of(records(4)), LABELS, BankConfig(prototypes_per_class=(2, 3, 1)), encoder)
        # patches that are mixtures but carry one tag, so that not all are right; and white ones, which count too
        judged = [
            replace(record(f"m{n}", 100 + n, n % 3, (n // 3) % 3), tags=Tags(np.eye(3, dtype=int)[n % 3]))
            for n in range(24)
        ]
        judged += [record("pale", 5, 2, white_rows=50), record("two", 6, 0, 1)]
        items = items_of(judged)
        with unreadable_masks():
            found = score_bank(items, bank, encoder, nearest=nearest)
        alone = judged[:-1]
        truth = [int(each.tags.values.argmax()) for each in alone]
        unit = torch.from_numpy(unit_features(encoder, [each.image for each in alone])).float()
        given = classify(unit, bank.prototypes, bank.counts, nearest=nearest).tolist()
        assert 0 < np.mean(np.array(truth) == given) < 1
        assert found.f1_mean == pytest.approx(f1_score(truth, given, average="macro"))
        assert found.f1 == pytest.approx(f1_score(truth, given, average=None, labels=[0, 1, 2]))
        assert found.accuracy == pytest.approx(np.mean(np.array(truth) == given))
        expected = np.zeros((3, 3), int)
        for true, said in zip(truth, given, strict=True):
            expected[true, said] += 1
        assert found.confusion.tolist() == expected.tolist()

    def test_the_training_patches_are_known_by_a_prototype_each(self, encoder):
        items = items_of(records(3))
        bank = build_bank(items, LABELS, BankConfig(prototypes_per_class=3, images_per_prototype=1), encoder)
        found = score_bank(items, bank, encoder, nearest=True)
        assert (found.f1_mean, found.accuracy) == (1, 1)

    def test_a_class_that_nobody_has_is_in_no_mean(self):
        found = scores_of(np.array([[3, 1, 0], [1, 5, 0], [0, 0, 0]]))
        assert np.isnan(found.f1[2])
        assert found.f1_mean == pytest.approx(np.mean([6 / 8, 10 / 12]))
        wrongly = scores_of(np.array([[3, 0, 1], [0, 5, 0], [0, 0, 0]]))
        assert wrongly.f1[2] == 0
        assert wrongly.f1_mean == pytest.approx(np.mean([6 / 7, 1, 0]))
        empty = scores_of(np.zeros((2, 2), np.int64))
        assert np.isnan(empty.f1_mean)

    def test_no_patch_with_a_single_tag(self, encoder):
        bank = build_bank(items_of(records(3)), LABELS, BankConfig(), encoder)
        items = items_of([record("pair", 1, 0, 1)])
        refused(lambda: score_bank(items, bank, encoder), "single tag")
        refused(lambda: score_bank(replace(items, tags=None), bank, encoder), "no tags")

    def test_the_white_filter_of_the_bank_is_not_that_of_the_score(self, encoder, monkeypatch):
        seen = []
        original = score.bank_features
        monkeypatch.setattr(score, "bank_features", lambda *words: seen.append(len(words[1])) or original(*words))
        bank = build_bank(items_of(records(3)), LABELS, BankConfig(prototypes_per_class=1), encoder)
        found = score_bank(items_of([record(f"pale_{n}", n, n, white_rows=60) for n in range(3)]), bank, encoder)
        assert seen == [3]
        assert found.confusion.sum() == 3


def test_prepare_gives_the_prototypes_to_the_method(tmp_path):
    labels = fake_labels()
    config = PBIPConfig(encoder={"name": "test_resnet"}, image_encoder=FROZEN, bank={"prototypes_per_class": (2, 1, 1)})
    data = fake_data(fake_dataset(labels, count=(10, 0, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RandomEncoderWarning)
        method = PBIP(config, labels)
        assert float(method.prototypes().abs().max()) == 0
        with unreadable_masks():
            method.prepare(data, tmp_path)
    bank = build_bank(data.hints("train", "tags"), labels, config.bank, encoder_of())
    torch.testing.assert_close(method.prototypes(), bank.prototypes)
    assert torch.equal(method.state_dict()["bank_prototypes"], method.prototypes())
    assert PBIP.read_bank(tmp_path).to_dict() == bank.to_dict()


class TestCenter:
    def unit(self, encoder, found):
        """Unit features in float64 of the single-tag patches, and their classes."""
        items = items_of(found)
        with torch.no_grad():
            images = torch.stack([items.sample(place).image for place in range(len(items))])
            vectors = F.normalize(encoder(images).double(), dim=1).numpy()
        classes = single_tags(items.tags)
        return vectors[classes >= 0], classes[classes >= 0]

    def test_prototypes_are_means_of_what_is_left_without_the_mean(self, encoder):
        found = records(4)
        config = BankConfig(prototypes_per_class=1, center=True)
        bank = build_bank(items_of(found), LABELS, config, encoder)
        vectors, classes = self.unit(encoder, found)
        mean = vectors.mean(0)
        np.testing.assert_allclose(bank.center.numpy(), mean, atol=1e-5)
        left = vectors - mean
        left /= np.linalg.norm(left, axis=1, keepdims=True)
        for number in range(3):
            expected = left[classes == number].mean(0)
            np.testing.assert_allclose(bank.prototypes[number].numpy(), expected / np.linalg.norm(expected), atol=1e-4)

    def test_without_it_nothing_is_taken_away(self, encoder):
        bank = build_bank(items_of(records(4)), LABELS, BankConfig(prototypes_per_class=1), encoder)
        assert not bank.center.any()

    def test_patches_are_classified_in_the_same_space(self, encoder):
        found = records(5)
        bank = build_bank(items_of(found), LABELS, BankConfig(prototypes_per_class=1, center=True), encoder)
        vectors, classes = self.unit(encoder, found)
        left = torch.from_numpy(vectors - vectors.mean(0)).float()
        given = classify(left, bank.prototypes, bank.counts).numpy()
        expected = f1_score(classes, given, average="macro")
        assert score_bank(items_of(found), bank, encoder).f1_mean == pytest.approx(expected)

    def test_a_method_compares_in_the_same_space_after_saving(self, tmp_path):
        from tissuehint.model import TissueModel

        given = {"encoder": {"name": "test_resnet"}, "image_encoder": FROZEN}
        config = PBIPConfig(bank={"prototypes_per_class": 1, "center": True}, **given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RandomEncoderWarning)
            method = PBIP(config, LABELS)
            data = TissueData(
                TissueDataset("bank", LABELS, {"train": tuple(records(4)), "val": (), "test": ()}),
                DataConfig(source="fake", workers=0),
            )
            method.prepare(data, tmp_path / "prepared")
            pictures = torch.rand(2, 3, 32, 32)
            expected = F.normalize(method.image_encoder.encode(pictures), dim=1) - method.bank_center
        assert method.bank_center.any()
        torch.testing.assert_close(method.encode(pictures), expected)
        TissueModel.from_method(method).save(tmp_path / "model")
        loaded = TissueModel.load(tmp_path / "model").network
        assert torch.equal(loaded.bank_center, method.bank_center)
        assert torch.equal(loaded.bank_prototypes, method.bank_prototypes)


def test_projected_are_the_differences_of_the_prototypes_from_their_mean():
    given = {"encoder": {"name": "test_resnet"}, "image_encoder": FROZEN, "bank": {"prototypes_per_class": 1}}
    method = PBIP(PBIPConfig(center_prototypes=True, **given), LABELS)
    method.bank_prototypes.copy_(torch.randn_like(method.bank_prototypes))
    seen = []
    method.network.projections[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    method.see(torch.rand(1, 3, 64, 64))
    values = method.bank_prototypes.double().numpy()
    left = values - values.mean(0)
    np.testing.assert_allclose(seen[0].numpy(), left / np.linalg.norm(left, axis=1).mean(), atol=1e-5)
    method = PBIP(PBIPConfig(center_prototypes=False, **given), LABELS)
    method.network.projections[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    method.see(torch.rand(1, 3, 64, 64))
    assert seen[1] is method.bank_prototypes
