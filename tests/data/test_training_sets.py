import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tissuehint.data.patches import PatchGrid, presence_tags, white_fractions, windows
from tissuehint.data.records import Record
from tissuehint.data.samples import collate
from tissuehint.data.training_sets import Draws, MaskSet, RoundSampler, build_hint_set, to_tensor
from tissuehint.data.transforms import Augmentation
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points, Proportions, Tags

few = settings(max_examples=30)
SPACE = LabelSpace(("gland", "stroma", "white"), white=2)
GRID = PatchGrid(side=16, stride=8, presence=0.1)


def pixels(record):
    return record.read_image()


def true_mask(record):
    return record.mask


def tissue(seed: int, height: int = 40, width: int = 52) -> Record:
    """Blocks of gland, stroma, white and ignored pixels; white ones are bright."""
    generator = np.random.default_rng(seed)
    coarse = generator.choice([0, 1, 2, 2, 255], (height // 13 + 1, width // 13 + 1))
    mask = coarse.repeat(13, 0).repeat(13, 1)[:height, :width].astype(np.uint8)
    image = generator.integers(0, 180, (height, width, 3)).astype(np.uint8)
    image[mask == 2] = 240
    return Record(f"image_{seed}", image, mask)


class TestRoundSampler:
    @staticmethod
    def stream(sampler, rounds):
        found = []
        for number in range(rounds):
            sampler.set_epoch(number)
            found.append(list(sampler))
            assert len(found[-1]) == len(sampler)
        return found

    @few
    @given(st.integers(1, 13), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99), st.integers(1, 6))
    def test_rounds_chained_go_through_all_items_again_and_again(self, items, batch, steps, seed, rounds):
        sampler = RoundSampler(items, batch_size=batch, steps=steps, seed=seed)
        drawn = [draw for part in self.stream(sampler, rounds) for draw in part]
        assert [number for _, number in drawn] == list(range(rounds * batch * steps)), "no draw is used twice"
        order = [item for item, _ in drawn]
        for start in range(0, len(order), items):
            turn = order[start : start + items]
            assert len(set(turn)) == len(turn), "an item comes again only after all others"
        counts = np.bincount(order, minlength=items)
        assert counts.max() - counts.min() <= 1

    @few
    @given(st.integers(1, 13), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]), st.integers(1, 4), st.integers(0, 99))
    def test_ranks_see_together_what_one_process_sees(self, items, local, world, steps, seed):
        arguments = {"batch_size": local * world, "steps": steps, "seed": seed}
        alone = self.stream(RoundSampler(items, **arguments), 3)
        ranks = [self.stream(RoundSampler(items, **arguments, rank=rank, world=world), 3) for rank in range(world)]
        for number, whole in enumerate(alone):
            for step in range(steps):
                mine = slice(step * local, (step + 1) * local)
                together = [draw for rank in ranks for draw in rank[number][mine]]
                assert sorted(together) == sorted(whole[step * local * world : (step + 1) * local * world])

    @few
    @given(st.integers(1, 13), st.integers(0, 7), st.integers(0, 99))
    def test_a_resumed_round_is_the_uninterrupted_one(self, items, number, seed):
        arguments = {"batch_size": 3, "steps": 4, "seed": seed}
        uninterrupted = self.stream(RoundSampler(items, **arguments), number + 1)[-1]
        resumed = RoundSampler(items, **arguments)
        resumed.set_epoch(number)
        assert list(resumed) == uninterrupted

    def test_the_order_changes_with_seed_and_pass(self):
        orders = [[item for item, _ in RoundSampler(50, batch_size=50, steps=2, seed=seed)] for seed in range(3)]
        parts = {tuple(order[start : start + 50]) for order in orders for start in (0, 50)}
        assert len(parts) == 6

    def test_a_batch_that_does_not_divide_is_refused(self):
        with pytest.raises(InputError, match=r"batch size 4: does not divide among 3 processes"):
            RoundSampler(10, batch_size=4, steps=1, seed=0, world=3)

    def test_nothing_to_draw_from_is_refused(self):
        with pytest.raises(InputError, match="training set"):
            RoundSampler(0, batch_size=4, steps=1, seed=0)


class TestBuildHintSet:
    @few
    @given(st.integers(0, 999), st.sampled_from([None, 0.3, 0.6, 1.0]), st.sampled_from(["tags", "proportions"]))
    def test_windows_without_tissue_and_white_ones_are_dropped(self, seed, max_white, supervision):
        records = [tissue(seed), tissue(seed + 1, 20, 30), tissue(seed + 2, 12, 70)]
        grid = GRID.model_copy(update={"max_white": max_white})
        expected = []
        for record in records:
            corners = windows(*record.mask.shape, grid.side, grid.stride)
            tags = presence_tags(record.mask, corners, grid, 2, 255)
            white = white_fractions(record.image, corners, grid)
            kept = tags.any(1) & (white <= (max_white or 1))
            for (top, left), row in zip(corners[kept], tags[kept], strict=True):
                expected.append((f"{record.id}_{top}_{left}", row.tolist()))
        if not expected:
            with pytest.raises(InputError, match="no item"):
                build_hint_set(records, SPACE, grid, pixels, supervision=supervision)
            return
        hints = build_hint_set(records, SPACE, grid, pixels, supervision=supervision)
        samples = [hints.sample(index) for index in range(len(hints))]
        assert [(sample.id, sample.tags.int().tolist()) for sample in samples] == expected
        owners = {record.id: record for record in records}
        for sample in samples:
            name, top, left = sample.id.rsplit("_", 2)
            part = np.s_[int(top) : int(top) + 16, int(left) : int(left) + 16]
            window, image = owners[name].mask[part], owners[name].image[part]
            np.testing.assert_array_equal(
                (sample.image[:, : window.shape[0], : window.shape[1]] * 255).round(), image.transpose(2, 0, 1)
            )
            shares = np.bincount(window.ravel(), minlength=256)[:2]
            np.testing.assert_allclose(sample.proportions, shares / shares.sum(), rtol=1e-6)

    def test_the_mask_is_in_no_sample_and_read_by_none(self, monkeypatch):
        records = [tissue(seed) for seed in range(3)]
        sets = [
            build_hint_set(records, SPACE, GRID, pixels, supervision="tags"),
            build_hint_set([whole(record) for record in records], SPACE, None, pixels, supervision="tags"),
            build_hint_set([whole(record) for record in records], SPACE, GRID, pixels, supervision="points"),
        ]

        def poison(*_):
            raise AssertionError("a training step must not look at the mask")

        monkeypatch.setattr(Record, "read_mask", poison)
        for hints in sets:
            for index in range(len(hints)):
                assert hints.sample(index).mask is None
                assert Draws(hints, Augmentation(), 0)[index, index].mask is None

    def test_the_pixels_come_through_the_reader(self):
        record = tissue(0)
        hints = build_hint_set([record], SPACE, GRID, lambda record: np.full_like(record.image, 51), supervision="tags")
        assert hints.sample(0).image.unique().tolist() == [pytest.approx(0.2)]

    def test_an_image_with_one_tag_can_be_cut_without_a_mask(self):
        record = Record("stroma_7", tissue(0).image, tags=Tags([0, 1]))
        hints = build_hint_set([record], SPACE, GRID, pixels, supervision="tags")
        assert len(hints) == len(windows(40, 52, 16, 8))
        assert {tuple(hints.sample(index).tags.tolist()) for index in range(len(hints))} == {(0, 1)}
        assert {tuple(hints.sample(index).proportions.tolist()) for index in range(len(hints))} == {(0, 1)}

    @pytest.mark.parametrize("tags", [None, Tags([1, 1]), Tags([0, 0])])
    def test_an_image_of_several_tissues_cannot_be_cut_without_a_mask(self, tags):
        with pytest.raises(InputError, match=r"mixed_3: is cut into patches"):
            build_hint_set([Record("mixed_3", tissue(0).image, tags=tags)], SPACE, GRID, pixels, supervision="tags")

    @pytest.mark.parametrize("grid", [None, GRID])
    @pytest.mark.parametrize("supervision", ["tags", "points", "proportions"])
    def test_an_image_without_the_hint_is_named(self, grid, supervision):
        hints = {"tags": Tags([1, 0]), "points": Points([(1, 1, 0)]), "proportions": Proportions([0.5, 0.5])}
        hints[supervision] = None
        if supervision == "proportions":
            hints["tags"] = Tags([1, 1])  # one tag alone would say the proportions
        with pytest.raises(InputError, match="bare_5"):
            build_hint_set([Record("bare_5", tissue(0).image, **hints)], SPACE, grid, pixels, supervision=supervision)

    def test_whole_images_keep_their_hints_and_those_without_tissue_are_dropped(self):
        image = tissue(0).image
        records = [
            Record("a", image, tags=Tags([1, 0]), proportions=Proportions([1, 0])),
            Record("empty", image, tags=Tags([0, 0]), proportions=Proportions([1, 0])),
            Record("b", image, tags=Tags([1, 1]), proportions=Proportions([0.25, 0.75])),
        ]
        hints = build_hint_set(records, SPACE, None, pixels, supervision="tags")
        samples = [hints.sample(index) for index in range(len(hints))]
        assert [sample.id for sample in samples] == ["a", "b"]
        assert [sample.tags.tolist() for sample in samples] == [[1, 0], [1, 1]]
        assert [sample.proportions.tolist() for sample in samples] == [[1, 0], [0.25, 0.75]]
        assert samples[0].image.shape == (3, 40, 52)

    @few
    @given(st.integers(8, 40), st.integers(8, 40), st.sampled_from([None, 16, 48, 80]))
    def test_points_lie_under_their_colour_in_every_patch(self, coded, height, width, resize):
        image, mask = coded(height, width, classes=2)
        rows, columns = np.divmod(np.arange(0, height * width, 5), width)
        points = Points(np.stack([rows, columns, mask[rows, columns]], 1))
        grid = GRID.model_copy(update={"resize": resize})
        hints = build_hint_set([Record("a", image, points=points)], SPACE, grid, pixels, supervision="points")
        seen = set()
        for index in range(len(hints)):
            sample = hints.sample(index)
            assert sample.image.shape == (3, grid.network_side, grid.network_side)
            top, left = (int(part) for part in sample.id.split("_")[1:])
            inside = (rows >= top) & (rows < top + 16) & (columns >= left) & (columns < left + 16)
            assert sample.points[:, 2].tolist() == mask[rows, columns][inside].tolist()
            places = (sample.image[:2, sample.points[:, 0], sample.points[:, 1]] * 255).T.numpy()
            assert np.abs(places - points.rows[inside, :2]).max(initial=0) <= 0.51
            seen |= set(np.flatnonzero(inside))
        assert seen == set(range(len(rows)))


def whole(record: Record) -> Record:
    return Record(record.id, record.image, record.mask, Tags([1, 0]), Points([(3, 4, 1)]), Proportions([0.5, 0.5]))


class TestMaskSet:
    @few
    @given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 10**6))
    def test_crops_hold_image_and_mask_of_one_place(self, coded, height, width, seed):
        image, mask = coded(height, width)
        masks = MaskSet([Record("a", image, mask)], pixels, true_mask, 20)
        sample = masks.sample(0, torch.Generator().manual_seed(seed))
        assert sample.image.shape == (3, 20, 20)
        assert sample.mask.shape == (20, 20)
        labelled = sample.mask != 255
        assert labelled.sum() == min(height, 20) * min(width, 20)
        assert torch.equal((sample.image[2] * 255).round().long()[labelled], sample.mask[labelled])
        rows, columns = (sample.image[:2] * 255).round().long()
        assert (mask[rows[labelled], columns[labelled]] == sample.mask[labelled].numpy()).all()

    def test_every_place_is_drawn(self, coded):
        image, mask = coded(18, 17)
        masks = MaskSet([Record("a", image, mask)], pixels, true_mask, 16)
        generator = torch.Generator().manual_seed(0)
        corners = {tuple((masks.sample(0, generator).image[:2, 0, 0] * 255).round().tolist()) for _ in range(200)}
        assert corners == {(row, column) for row in range(3) for column in range(2)}

    def test_a_mask_of_another_size_is_refused(self, coded):
        image, mask = coded(30, 30)
        masks = MaskSet([Record("case_9", image)], pixels, lambda record: mask[:20], 16)
        with pytest.raises(InputError, match=r"case_9.*20 x 30.*30 x 30"):
            masks.sample(0, torch.Generator())


class TestWorkers:
    @pytest.mark.parametrize("kind", ["hints", "masks"])
    def test_two_give_the_batches_of_none(self, kind):
        records = [tissue(seed) for seed in range(4)]
        if kind == "hints":
            items = build_hint_set(records, SPACE, GRID, pixels, supervision="tags")
        else:
            items = MaskSet(records, pixels, true_mask, 20)
        batches = []
        for workers in (0, 2):
            sampler = RoundSampler(len(items), batch_size=3, steps=4, seed=5)
            sampler.set_epoch(2)
            draws = Draws(items, Augmentation(scale=0.5, blur=0.5), 5)
            loader = DataLoader(draws, batch_size=3, sampler=sampler, num_workers=workers, collate_fn=collate)
            batches.append(list(loader))
        assert len(batches[0]) == 4
        for alone, shared in zip(*batches, strict=True):
            assert alone.ids == shared.ids
            assert torch.equal(alone.images, shared.images)
            assert (alone.masks is None) == (kind == "hints")
            if alone.masks is not None:
                assert torch.equal(alone.masks, shared.masks)


@pytest.mark.filterwarnings("error")
def test_read_only_pixels_make_a_tensor_without_a_warning():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    image.flags.writeable = False
    tensor = to_tensor(image)
    tensor += 1
    np.testing.assert_allclose(tensor, image.transpose(2, 0, 1) / 255 + 1, rtol=1e-6)
