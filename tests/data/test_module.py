from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from tissuehint.data.module import DataConfig, TissueData, WeakConfig, draw_fraction, load_dataset
from tissuehint.data.patches import PatchGrid
from tissuehint.data.records import Record, TissueDataset
from tissuehint.data.samples import collate
from tissuehint.data.training_sets import Draws
from tissuehint.errors import InputError
from tissuehint.files import write_palette_png
from tissuehint.labels import IGNORE, LabelSpace, Points, Tags

SPACE = LabelSpace(("gland", "stroma", "white"), white=2)
CONFIG = DataConfig(source="test", workers=0)


def make_record(folder: Path, name: str, seed: int, side: int = 32) -> Record:
    generator = np.random.default_rng(seed)
    mask = generator.integers(0, 3, (4, 4)).repeat(side // 4, 0).repeat(side // 4, 1).astype(np.uint8)
    mask[:4, :4] = 0
    Image.fromarray(generator.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(mask).save(folder / f"{name}_mask.png")
    return Record(name, folder / f"{name}.png", folder / f"{name}_mask.png")


@pytest.fixture
def dataset(tmp_path):
    splits = {"train": 4, "val": 2, "test": 2}
    records = {
        split: tuple(make_record(tmp_path, f"{split}_{index}", 10 * place + index) for index in range(count))
        for place, (split, count) in enumerate(splits.items())
    }
    return TissueDataset("test", SPACE, records)


def batches(data, rounds=1):
    found = []
    loader = data.train_dataloader()
    for number in range(rounds):
        loader.sampler.set_epoch(number)
        found += list(loader)
    return found


class TestCache:
    def test_pixels_are_the_same_with_and_without(self, dataset):
        kept, read = TissueData(dataset, CONFIG), TissueData(dataset, CONFIG.model_copy(update={"cache_mb": 0}))
        assert len(kept.read.kept) == 8
        assert not read.read.kept
        for split in ("train", "val", "test"):
            for record in dataset.splits[split]:
                np.testing.assert_array_equal(kept.read(record), read.read(record))
                np.testing.assert_array_equal(kept.read(record), record.read_image())
        for data in (kept, read):
            data.train_on(data.hints("train", "tags"), batch_size=2, round_steps=3)
        for one, other in zip(batches(kept), batches(read), strict=True):
            assert one.ids == other.ids
            assert torch.equal(one.images, other.images)

    def test_all_or_nothing(self, dataset):
        # eight images of 32 x 32 are 24.6 kB; what does not fit whole is not kept in part
        big = replace(dataset, splits={"train": tuple(dataset.splits["train"]) * 50})
        assert not TissueData(big, CONFIG.model_copy(update={"cache_mb": 0})).read.kept
        assert TissueData(big, CONFIG.model_copy(update={"cache_mb": 1})).read.kept

    @pytest.mark.parametrize("cache_mb", [0, 100])
    def test_a_truncated_image_is_named(self, dataset, cache_mb):
        path = dataset.splits["train"][2].image
        path.write_bytes(path.read_bytes()[:-500])
        record, config = dataset.splits["train"][2], CONFIG.model_copy(update={"cache_mb": cache_mb})
        with pytest.raises(InputError, match=r"train_2\.png: cannot be read") as error:
            TissueData(dataset, config).read(record)
        assert "\n" not in str(error.value)


class TestRecords:
    def test_the_limit_cuts_the_training_split_alone(self, dataset):
        data = TissueData(dataset, CONFIG.model_copy(update={"train_limit": 3}))
        assert [len(data.records(split)) for split in ("train", "val", "test")] == [3, 2, 2]
        assert data.records("train") == dataset.splits["train"][:3]
        assert len(data.hints("train", "tags")) == len(data.true_masks(16)) == 3
        assert data.records("extra") == ()


class TestFraction:
    """``train_fraction``: a share of the training images, drawn at random."""

    @staticmethod
    def blank(count: int) -> list[Record]:
        pixels = np.zeros((1, 1, 3), np.uint8)
        return [Record(f"image_{index}", pixels, group=f"patient_{index // 4}") for index in range(count)]

    @given(
        count=st.integers(1, 90),
        seed=st.integers(0, 2**31),
        shares=st.lists(st.floats(1e-6, 1), min_size=2, max_size=4),
    )
    def test_a_smaller_share_is_part_of_a_larger_one_in_the_order_of_the_records(self, count, seed, shares):
        records = self.blank(count)
        before: list[str] = []
        for share in sorted(shares):
            names = [record.id for record in draw_fraction(records, share, seed)]
            assert set(before) <= set(names)
            assert names == [record.id for record in records if record.id in set(names)]
            assert len(names) >= 1
            assert abs(len(names) - max(1, share * count)) <= 0.5 + 1e-9
            before = names

    @given(order=st.permutations(range(12)), seed=st.integers(0, 99))
    def test_the_order_of_the_records_does_not_choose(self, order, seed):
        records = self.blank(12)
        turned = draw_fraction([records[place] for place in order], 0.4, seed)
        assert {record.id for record in turned} == {record.id for record in draw_fraction(records, 0.4, seed)}

    @pytest.mark.parametrize(
        ("share", "count", "drawn"),
        [(0.01, 70, 1), (0.05, 70, 4), (0.145, 100, 15), (0.5, 3, 2), (1e-9, 9, 1), (1.0, 9, 9), (0.5, 0, 0)],
    )
    def test_halves_are_rounded_up_and_one_is_left(self, share, count, drawn):
        assert len(draw_fraction(self.blank(count), share, 0)) == drawn

    def test_every_image_has_the_same_chance(self):
        records = self.blank(10)
        hits = sum(np.isin([record.id for record in records], [each.id for each in draw_fraction(records, 0.3, seed)])
                   for seed in range(600))  # fmt: skip
        # 180 each, with a standard deviation of sqrt(600 * .3 * .7) = 11
        assert np.abs(hits - 180).max() < 50

    def test_all_stages_and_the_ceiling_see_the_same_images_and_other_splits_are_whole(self, dataset):
        data = TissueData(dataset, CONFIG.model_copy(update={"train_fraction": 0.5}))
        assert [len(data.records(split)) for split in ("train", "val", "test")] == [2, 2, 2]
        drawn = [record.id for record in data.records("train")]
        hints, masks = data.hints("train", "tags"), data.true_masks(None)
        assert [hints.sample(index).id for index in range(len(hints))] == drawn
        assert [masks.sample(index, torch.Generator()).id for index in range(len(masks))] == drawn
        assert {name for name in data.read.kept if name.startswith("train")} == set(drawn)

    def test_the_seed_is_its_own_or_that_of_the_hints(self, dataset):
        def drawn(**values):
            config = CONFIG.model_copy(update={"train_fraction": 0.5, **values})
            return [record.id for record in TissueData(dataset, config).records("train")]

        hints = {seed: drawn(weak=WeakConfig(seed=seed)) for seed in range(12)}
        own = {seed: drawn(train_fraction_seed=seed, weak=WeakConfig(seed=3)) for seed in range(12)}
        assert hints == own
        assert len({tuple(names) for names in own.values()}) > 1

    @pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), "some"])
    def test_what_is_no_share(self, share):
        with pytest.raises(ValidationError, match="train_fraction"):
            DataConfig(source="phantom", train_fraction=share)

    def test_a_limit_and_a_share_exclude_each_other(self):
        with pytest.raises(ValidationError, match="train_limit and train_fraction both"):
            DataConfig(source="phantom", train_fraction=0.5, train_limit=3)


class TestSimulatedHints:
    def test_tags_come_from_the_mask(self, dataset):
        data = TissueData(dataset, CONFIG)
        hints = data.hints("train", "tags")
        for index, record in enumerate(dataset.splits["train"]):
            mask = record.read_mask(SPACE)
            assert hints.sample(index).tags.tolist() == [float((mask == label).any()) for label in (0, 1)]

    @pytest.mark.parametrize("supervision", ["tags", "points", "proportions"])
    @pytest.mark.parametrize("patches", [None, PatchGrid(side=16, stride=16)])
    def test_they_are_the_same_again_and_in_any_order(self, dataset, supervision, patches):
        config = CONFIG.model_copy(update={"patches": patches, "weak": WeakConfig(noise=0.05, seed=3)})
        turned = replace(dataset, splits={"train": dataset.splits["train"][::-1]})
        found = []
        for each in (dataset, dataset, turned):
            hints = TissueData(each, config).hints("train", supervision)
            samples = [hints.sample(index) for index in range(len(hints))]
            found.append({sample.id: getattr(sample, supervision).tolist() for sample in samples})
        assert found[0] == found[1] == found[2]

    @pytest.mark.parametrize("supervision", ["points", "proportions"])
    def test_the_seed_matters(self, dataset, supervision):
        found = []
        for seed in (0, 1):
            rules = WeakConfig(noise=0.05, seed=seed)
            hints = TissueData(dataset, CONFIG.model_copy(update={"weak": rules})).hints("train", supervision)
            found.append([getattr(hints.sample(index), supervision).tolist() for index in range(len(hints))])
        assert found[0] != found[1]

    def test_points_lie_on_their_class(self, dataset):
        hints = TissueData(dataset, CONFIG).hints("train", "points")
        for index, record in enumerate(dataset.splits["train"]):
            mask = record.read_mask(SPACE)
            rows, columns, labels = hints.sample(index).points.T.numpy()
            assert (mask[rows, columns] == labels).all()
            assert set(labels) == set(mask.ravel()) - {2}

    def test_what_the_data_set_brings_is_kept(self, dataset):
        record = replace(dataset.splits["train"][0], tags=Tags([0, 1]), points=Points([(1, 2, 1)]))
        data = TissueData(replace(dataset, splits={"train": (record,)}), CONFIG)
        assert data.hints("train", "tags").sample(0).tags.tolist() == [0, 1]
        assert data.hints("train", "points").sample(0).points.tolist() == [[1, 2, 1]]

    @pytest.mark.parametrize("supervision", ["tags", "points", "proportions"])
    def test_neither_hint_nor_mask_is_refused_by_name(self, dataset, supervision):
        bare = replace(dataset, splits={"train": (replace(dataset.splits["train"][0], mask=None),)})
        with pytest.raises(InputError, match="train_0"):
            TissueData(bare, CONFIG).hints("train", supervision)

    @pytest.mark.parametrize("supervision", ["tags", "proportions"])
    def test_an_image_without_tissue_is_left_out(self, dataset, supervision):
        empty = replace(dataset.splits["train"][1], mask=np.full((32, 32), 2, np.uint8))
        data = TissueData(replace(dataset, splits={"train": (dataset.splits["train"][0], empty)}), CONFIG)
        hints = data.hints("train", supervision)
        assert [hints.sample(index).id for index in range(len(hints))] == ["train_0"]


class TestMasks:
    def test_the_ceiling_needs_masks(self, dataset):
        bare = replace(dataset, splits={"train": (replace(dataset.splits["train"][0], mask=None),)})
        with pytest.raises(InputError, match=r"train_0: has no mask"):
            TissueData(bare, CONFIG).true_masks(16).sample(0, torch.Generator())

    def test_pseudo_masks_are_read_by_id(self, dataset, tmp_path):
        folder, data = tmp_path / "pseudo", TissueData(dataset, CONFIG)
        for record in dataset.splits["train"]:
            red = record.read_image()[..., 0]
            write_palette_png(folder / f"{record.id}.png", np.where(red > 250, 255, red % 3), SPACE.palette())
        masks = data.pseudo_masks(folder, 16)
        for index in range(len(masks)):
            sample = masks.sample(index, torch.Generator().manual_seed(index))
            red = (sample.image[0] * 255).round().long()
            assert torch.equal(sample.mask, torch.where(red > 250, 255, red % 3))

    def test_a_missing_pseudo_mask_is_named(self, dataset, tmp_path):
        masks = TissueData(dataset, CONFIG).pseudo_masks(tmp_path / "pseudo", 16)
        with pytest.raises(InputError, match=r"pseudo.train_0\.png: does not exist"):
            masks.sample(0, torch.Generator())

    @pytest.mark.parametrize("kind", ["true", "pseudo"])
    def test_training_ignores_255_whatever_the_data_set_writes(self, dataset, tmp_path, kind):
        space = LabelSpace(SPACE.names, white=2, ignore=100)
        mask = np.zeros((32, 32), np.uint8)
        mask[::2] = 100
        record = replace(dataset.splits["train"][0], mask=mask)
        data = TissueData(TissueDataset("test", space, {"train": (record,)}), CONFIG)
        write_palette_png(tmp_path / "train_0.png", mask, space.palette())
        masks = data.true_masks(16) if kind == "true" else data.pseudo_masks(tmp_path, 16)
        assert set(masks.sample(0, torch.Generator()).mask.unique().tolist()) == {0, IGNORE}


class TestLoaders:
    def test_two_worker_processes_give_the_batches_of_none(self, dataset):
        found = []
        for workers in (0, 2):
            data = TissueData(dataset, CONFIG.model_copy(update={"workers": workers}), seed=4)
            data.train_on(data.hints("train", "tags"), batch_size=2, round_steps=2)
            found.append(batches(data, rounds=2))
        for one, other in zip(*found, strict=True):
            assert one.ids == other.ids
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.tags, other.tags)

    def test_the_seed_orders_and_moves(self, dataset):
        found = []
        for seed in (1, 1, 2):
            data = TissueData(dataset, CONFIG, seed=seed)
            data.train_on(data.hints("train", "tags"), batch_size=4, round_steps=2)
            found.append(torch.cat([batch.images for batch in batches(data)]))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_validation_items_are_bounded_spread_and_plain(self, dataset):
        config = CONFIG.model_copy(update={"patches": PatchGrid(side=16, stride=1)})
        data = TissueData(dataset, config)
        hints, items = data.hints("train", "tags"), data.hints("val", "tags")
        assert len(items) > 300
        data.train_on(hints, batch_size=8, round_steps=1, validation=items)
        loader = data.val_dataloader()
        found = list(loader)
        names = [name for batch in found for name in batch.ids]
        assert len(names) == len(set(names)) == 256
        assert {name.rsplit("_", 2)[0] for name in names} == {"val_0", "val_1"}
        plain = {items.sample(index).id: items.sample(index).image for index in range(len(items))}
        for batch in found[:3]:
            for name, image in zip(batch.ids, batch.images, strict=True):
                assert torch.equal(image, plain[name]), "validation is not augmented"

    @pytest.mark.parametrize("count", [1, 2, 9, 17])
    def test_every_process_validates_as_many_items(self, dataset, count):
        data = TissueData(dataset, CONFIG.model_copy(update={"patches": PatchGrid(side=16, stride=8)}))
        hints = data.hints("val", "tags")
        items = replace(hints, owner=hints.owner[:count], corners=hints.corners[:count])
        assert len(items) == count
        data.train_on(hints, batch_size=8, round_steps=1, validation=items)
        sizes, names = set(), set()
        for rank in range(4):
            device = SimpleNamespace(root_device=torch.device("cpu"))
            data.trainer = SimpleNamespace(global_rank=rank, world_size=4, strategy=device)
            found = list(data.val_dataloader())
            sizes.add(tuple(len(batch) for batch in found))
            names |= {name for batch in found for name in batch.ids}
        # a process without any would never come to where the others wait for it
        assert len(sizes) == 1
        assert sum(next(iter(sizes))) == -(-count // 4)
        assert names == {items.sample(index).id for index in range(count)}

    def test_no_validation_no_loader(self, dataset):
        data = TissueData(dataset, CONFIG)
        data.train_on(data.hints("train", "tags"), batch_size=2, round_steps=1)
        assert data.val_dataloader() == []


class TestConfig:
    def test_unknown_keys_are_refused(self):
        with pytest.raises(ValidationError):
            DataConfig(source="phantom", patch=3)

    def test_the_folder_is_found(self, tmp_path, monkeypatch):
        (tmp_path / "luad-histoseg").mkdir()
        monkeypatch.setenv("TISSUEHINT_DATA", str(tmp_path))
        assert DataConfig(source="luad_histoseg").folder() == tmp_path / "luad-histoseg"
        assert DataConfig(source="glas").folder() == tmp_path / "glas"
        assert DataConfig(source="glas", root="$TISSUEHINT_DATA/x").folder() == tmp_path / "x"
        assert DataConfig(source="glas", root="~/x").folder() == Path.home() / "x"
        monkeypatch.delenv("TISSUEHINT_DATA")
        with pytest.raises(InputError, match=r"has no data\.root"):
            DataConfig(source="glas").folder()
        with pytest.raises(InputError) as refused:  # one's own data has no name below the variable
            DataConfig(source="folder").folder()
        assert "TISSUEHINT_DATA" not in str(refused.value)

    def test_an_unknown_source_is_refused(self, tmp_path):
        with pytest.raises(InputError, match="glass"):
            load_dataset(DataConfig(source="glass", root=str(tmp_path)))

    def test_the_phantom_has_the_size_that_was_asked_for(self):
        config = DataConfig(source="phantom", phantom={"train": 2, "val": 0, "test": 1, "size": 64})
        dataset = load_dataset(config)
        assert [len(dataset.splits[split]) for split in ("train", "val", "test")] == [2, 0, 1]
        assert dataset.splits["train"][0].size() == (64, 64)


class _Damaged:
    """Items that a worker process cannot read."""

    def __len__(self):
        return 4

    def sample(self, index, generator):
        raise InputError("a.png", "cannot be read as an image (truncated)", "replace the file")


def test_bad_input_in_a_worker_is_told_in_one_line():
    draws = Draws(_Damaged(), None, 0)
    loader = DataLoader(draws, sampler=[(0, 0)], num_workers=1, collate_fn=collate)
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert str(caught.value) == "a.png: cannot be read as an image (truncated); replace the file"
