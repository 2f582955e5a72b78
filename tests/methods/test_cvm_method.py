"""CVM in training: when u is made, where it is kept, which weights remain."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from tissuehint.data.records import TissueDataset
from tissuehint.data.samples import Batch
from tissuehint.data.training_sets import to_tensor
from tissuehint.data.transforms import Augmentation
from tissuehint.errors import InputError
from tissuehint.labels import Points
from tissuehint.methods.cvm import CVM, CVMConfig
from tissuehint.methods.cvm.complement import complement
from tissuehint.methods.cvm.losses import grid_points, hard_cross_entropy, partial_cross_entropy, weighted_kl
from tissuehint.pipeline.recipe import TrainerSettings
from tissuehint.pipeline.training import BEST_WEIGHTS, Fit, LowestRound, load_weights
from tissuehint.testing import MethodCase, fake_batch, fake_dataset, fake_labels
from tissuehint.testing.contract import Killed, unreadable_masks
from tissuehint.testing.fakes import NO_AUGMENTATION, fake_data

UNET = {
    "architecture": "unet",
    "encoder": {"name": "test_resnet"},
    "decoder": {"encoder_depth": 3, "decoder_channels": [16, 16, 8]},
}
TRUNK = {**UNET, "trunk": {"encoder": {"name": "resnet18"}, "stride": 4}}
FAST = {"name": "adamw", "learning_rate": 1e-3, "head_multiplier": 5, "power": 0}
LABELS = fake_labels(tissue=2)
VALUE = "val_partial_cross_entropy"


def method_of(network: dict[str, Any] = UNET, labels: Any = LABELS, **settings: Any) -> CVM:
    torch.manual_seed(0)
    return CVM(CVMConfig(network=network, optimization=FAST, **settings), labels)


def dataset_of(train: int = 5, val: int = 2, size: int | tuple[int, int] = 64, *, masks: bool = False) -> TissueDataset:
    """Images with both classes, so that every one has a contrast."""
    dataset = fake_dataset(LABELS, count=(4 * (train + val), 0, 0), size=size, masks=masks)
    both = [each for each in dataset.splits["train"] if each.points and len(set(each.points.rows[:, 2])) == 2]
    return replace(dataset, splits={"train": tuple(both[:train]), "val": tuple(both[train : train + val])})


@dataclass
class Round:
    """State after a round."""

    stored: dict[str, bytes]
    published: str
    weights: dict[str, Tensor]


def stored_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("complement/refresh_*/*.npz")}


@contextmanager
def watched_rounds(folder: Path, values: Sequence[float] | None) -> Iterator[list[Round]]:
    """What stands on disk after each round, with the validation value said by ``values`` instead of the network."""
    rounds: list[Round] = []
    original = CVM.on_train_epoch_end

    def begin(self: LowestRound, trainer: Any, module: CVM) -> None:
        if values is not None:
            trainer.callback_metrics[VALUE] = torch.tensor(values[trainer.current_epoch])
        keep(self, trainer, module)

    def end(self: CVM) -> None:
        if values is not None:
            with patch.dict(self.trainer.callback_metrics, {VALUE: torch.tensor(values[self.trainer.current_epoch])}):
                original(self)
        else:
            original(self)
        pointer = folder / "complement" / "current.txt"
        weights = {name: value.clone() for name, value in self.state_dict().items()}
        newest = folder / "complement" / f"refresh_{int(pointer.read_text() or -1):05d}"
        files = {path.name: path.read_bytes() for path in newest.glob("*.npz")}
        rounds.append(Round(files, pointer.read_text(), weights))

    keep = LowestRound.on_train_epoch_end
    with patch.object(CVM, "on_train_epoch_end", end), patch.object(LowestRound, "on_train_epoch_end", begin):
        yield rounds


def fit_of(folder: Path, *, steps: int, round_steps: int = 1) -> Fit:
    settings = TrainerSettings(accelerator="cpu", progress=False)
    return Fit(folder, steps=steps, batch_size=4, round_steps=round_steps, settings=settings, seed=0)


def train(
    method: CVM,
    folder: Path,
    dataset: TissueDataset,
    *,
    rounds: int = 4,
    values: Sequence[float] | None = None,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> list[Round]:
    fit = fit_of(folder, steps=rounds)
    data = fake_data(dataset, augmentation=augmentation)
    with watched_rounds(folder, values) as seen, unreadable_masks():
        method.fit(fit, data)
    return seen


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


class TestRefresh:
    VALUES = (0.9, 0.95, 0.7, 0.7)

    def test_u_is_made_at_a_new_minimum_alone_and_the_weights_are_those_of_the_lowest_round(
        self, tmp_path: Path
    ) -> None:
        method = method_of()
        rounds = train(method, tmp_path, dataset_of(), values=self.VALUES)
        assert [each.published for each in rounds] == ["0", "0", "2", "2"]
        assert len(rounds[0].stored) == 5
        assert rounds[1].stored == rounds[0].stored
        assert rounds[2].stored != rounds[0].stored
        assert rounds[3].stored == rounds[2].stored
        assert (method.lowest, method.refresh) == (pytest.approx(0.7), 2)
        assert [same(method.state_dict(), each.weights) for each in rounds] == [False, False, True, False]
        assert [path.name for path in tmp_path.glob("complement/refresh_*")] == ["refresh_00002"]

    def test_what_decides_is_the_logged_partial_cross_entropy_of_the_validation_points(self, tmp_path: Path) -> None:
        dataset = dataset_of(val=3)
        method = method_of()
        rounds = train(method, tmp_path, dataset)
        expected = []
        for each in rounds:
            method.load_state_dict(each.weights)
            method.eval()
            losses = []
            for record in dataset.splits["val"]:
                with torch.no_grad():
                    logits = method.network(to_tensor(record.read_image())[None])
                points = grid_points(torch.from_numpy(record.points.rows), (64, 64), (64, 64))
                losses.append(partial_cross_entropy(logits.log_softmax(1), [points], radius=1).item())
            expected.append(np.mean(losses))
        with (tmp_path / "metrics.csv").open() as file:
            logged = [float(row[VALUE]) for row in csv.DictReader(file) if row[VALUE]]
        assert logged == pytest.approx(expected, rel=1e-4)
        lows = [value == min(expected[: number + 1]) for number, value in enumerate(expected)]
        published = [int(each.published) for each in rounds]
        assert published == [max(n for n in range(number + 1) if lows[n]) for number in range(len(rounds))]

    def test_validation_images_without_point_are_left_out_of_the_mean(self, tmp_path: Path) -> None:
        dataset = dataset_of()
        val = dataset.splits["val"]
        bare = replace(val[0], id="bare", points=Points(np.zeros((0, 3))))
        values = []
        for name, records in (("plain", val), ("more", (*val, bare, bare, bare))):
            method = method_of()
            train(method, tmp_path / name, replace(dataset, splits={**dataset.splits, "val": records}), rounds=1)
            values.append(method.lowest)
        assert values[0] == pytest.approx(values[1], rel=1e-5)

    @pytest.mark.parametrize("val", [0, 2], ids=["no_images", "no_points"])
    def test_without_validation_points_u_is_made_each_round_and_the_last_weights_stay(
        self, tmp_path: Path, val: int
    ) -> None:
        dataset = dataset_of(val=val)
        bare = tuple(replace(each, points=Points(np.zeros((0, 3)))) for each in dataset.splits["val"])
        method = method_of()
        rounds = train(method, tmp_path, replace(dataset, splits={**dataset.splits, "val": bare}), rounds=3)
        assert [each.published for each in rounds] == ["0", "1", "2"]
        assert same(method.state_dict(), rounds[-1].weights)
        assert not (tmp_path / BEST_WEIGHTS).exists()

    def test_last_weights_on_demand(self, tmp_path: Path) -> None:
        method = method_of(keep="last")
        rounds = train(method, tmp_path, dataset_of())
        assert same(method.state_dict(), rounds[-1].weights)

    def test_nan_is_no_minimum(self, tmp_path: Path) -> None:
        method = method_of()
        rounds = train(method, tmp_path, dataset_of(), values=(0.8, float("nan"), 0.9, 0.6))
        assert [each.published for each in rounds] == ["0", "0", "0", "3"]
        assert same(method.state_dict(), rounds[3].weights)

    def test_nan_at_first_makes_no_u(self, tmp_path: Path) -> None:
        rounds = train(method_of(), tmp_path, dataset_of(), rounds=2, values=(float("nan"), 0.8))
        assert [each.published for each in rounds] == ["", "1"]

    def test_the_first_round_trains_on_points_alone(self, tmp_path: Path) -> None:
        train(method_of(), tmp_path, dataset_of(), rounds=3, values=(0.9, 0.8, 0.7))
        with (tmp_path / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["train_weighted_kl"]]
        divergences = [float(row["train_weighted_kl"]) for row in rows]
        assert divergences[0] == 0
        assert min(divergences[1:]) > 0

    @pytest.mark.parametrize("name", ["none", "mean_teacher"])
    def test_a_method_without_u_stores_nothing_and_keeps_the_lowest_round(self, tmp_path: Path, name: str) -> None:
        method = method_of(complement=name)
        method.fit(fit_of(tmp_path, steps=2), fake_data(dataset_of()))
        assert not (tmp_path / "complement").exists()
        kept = method_of(complement=name)
        load_weights(kept, tmp_path / BEST_WEIGHTS)
        assert same(kept.state_dict(), method.state_dict())


class TestStoredU:
    @pytest.mark.parametrize(("network", "size"), [(UNET, (64, 80)), (TRUNK, (65, 97))], ids=["unet", "trunk"])
    def test_belongs_to_the_item_as_it_is_before_augmentation(
        self, tmp_path: Path, network: dict[str, Any], size: tuple[int, int]
    ) -> None:
        dataset = dataset_of(size=size)
        method = method_of(network)
        train(method, tmp_path, dataset, rounds=1, values=(0.5,), augmentation=Augmentation())
        assert method.store is not None
        method.eval()
        for record in dataset.splits["train"]:
            stored = method.store(record.id)
            assert stored is not None
            with torch.no_grad():
                dense = method.network.dense(to_tensor(record.read_image())[None])
            grid = (dense.logits.shape[2], dense.logits.shape[3])
            covered = method.network.main.covered(*size)
            points = grid_points(torch.from_numpy(record.points.rows), covered, grid)
            u = complement(method.config, method.targets, dense.features, dense.logits, [points])[0]
            side = covered[0] // grid[0]
            expected = u.repeat_interleave(side, 1).repeat_interleave(side, 2)
            assert stored.shape == expected.shape
            # the solver may stop an iteration earlier in another batch
            assert float((stored - expected).abs().mean()) < 0.01

    def test_guides_become_means_over_the_cells_of_the_grid(self) -> None:
        method = method_of(TRUNK).eval()
        batch = fake_batch(LABELS, count=2, height=65, width=97)
        guides = torch.rand(2, 2, 65, 97).softmax(1)
        guides[1] = 0
        logits = method.network.dense(batch.images).logits
        u = torch.zeros(2, 2, 17, 25)
        for i, j in np.ndindex(17, 25):
            cell = guides[0, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            if cell[0].numel() > 8:  # of a cell less than half of which is image nothing is said
                u[0, :, i, j] = cell.mean((1, 2))
        terms = method.losses(replace(batch, guides=guides))
        expected = weighted_kl(logits.log_softmax(1), u)
        assert terms["weighted_kl"].item() == pytest.approx(expected.item(), rel=1e-5)

    def test_cross_entropy_and_weight_are_settings(self) -> None:
        guides = torch.rand(2, 2, 64, 64).softmax(1)
        batch = replace(fake_batch(LABELS, count=2), guides=guides)
        method = method_of(consistency="cross_entropy", complement_weight=0.25).eval()
        terms = method.losses(batch)
        expected = 0.25 * hard_cross_entropy(method.network(batch.images).log_softmax(1), guides)
        assert terms["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert set(terms) == {"partial_cross_entropy", "cross_entropy"}

    def test_a_run_killed_between_refresh_and_checkpoint_ends_in_the_same(self, tmp_path: Path) -> None:
        values = (0.9, 0.8, 0.7)
        plain = method_of()
        train(plain, tmp_path / "plain", dataset_of(), rounds=3, values=values)
        original = CVM.on_save_checkpoint

        def killed(self: CVM, checkpoint: dict[str, Any]) -> None:
            if self.trainer.current_epoch == 1:
                raise Killed
            original(self, checkpoint)

        with patch.object(CVM, "on_save_checkpoint", killed), pytest.raises(Killed):
            train(method_of(), tmp_path / "killed", dataset_of(), rounds=3, values=values)
        folders = sorted(path.name for path in (tmp_path / "killed" / "complement").glob("refresh_*"))
        assert folders == ["refresh_00000", "refresh_00001"]
        assert (tmp_path / "killed" / "complement" / "current.txt").read_text() == "1"
        again = method_of()
        train(again, tmp_path / "killed", dataset_of(), rounds=3, values=values)
        assert same(again.state_dict(), plain.state_dict())
        assert stored_files(tmp_path / "killed") == stored_files(tmp_path / "plain")

    def test_a_run_killed_after_its_last_checkpoint_ends_in_the_same(self, tmp_path: Path) -> None:
        values = (0.7, 0.8)
        plain = method_of()
        train(plain, tmp_path / "plain", dataset_of(), rounds=2, values=values)

        def killed(self: LowestRound, module: Any) -> None:
            raise Killed

        with patch.object(LowestRound, "restore", killed), pytest.raises(Killed):
            train(method_of(), tmp_path / "killed", dataset_of(), rounds=2, values=values)
        again = method_of()
        train(again, tmp_path / "killed", dataset_of(), rounds=2, values=values)
        assert same(again.state_dict(), plain.state_dict())
        assert stored_files(tmp_path / "killed") == stored_files(tmp_path / "plain")

    def test_masks_make_no_difference(self, tmp_path: Path) -> None:
        ends = []
        for masks in (False, True):
            method = method_of()
            train(method, tmp_path / str(masks), dataset_of(masks=masks), rounds=2)
            ends.append(method.state_dict())
        assert same(*ends)
        assert stored_files(tmp_path / "True") == stored_files(tmp_path / "False")


def two_sided_batch() -> Batch:
    """Four images; points of both classes, of the last, of the first, none."""
    batch = fake_batch(LABELS, count=4)
    both = torch.tensor([[8, 10, 0], [30, 20, 0], [40, 50, 1], [12, 60, 1]])
    return replace(batch, points=[both, both[2:], both[:2], both[:0]])


class TestMaps:
    def test_guided_by_points_of_one_side_is_the_own_prediction(self) -> None:
        method, batch = method_of().eval(), two_sided_batch()
        with torch.no_grad():
            guided, predicted = method.label_guided(batch), method.predict(batch.images)
        torch.testing.assert_close(guided[1:3], predicted[1:3], rtol=0, atol=1e-6)
        assert not torch.allclose(guided[0], predicted[0], atol=1e-2)
        assert not guided[3].any()

    def test_guided_by_u(self) -> None:
        labels = fake_labels(tissue=2, white=False)
        method, batch = method_of(labels=labels).eval(), two_sided_batch()
        with torch.no_grad():
            guided, u = method.label_guided(batch)[0], method.explain(batch)["u"][0]
        torch.testing.assert_close(guided, u, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["none", "mean_teacher"])
    def test_without_u_guided_is_the_own_prediction(self, name: str) -> None:
        method, batch = method_of(complement=name).eval(), two_sided_batch()
        with torch.no_grad():
            guided, predicted = method.label_guided(batch), method.predict(batch.images)
        torch.testing.assert_close(guided[:3], predicted[:3], rtol=0, atol=1e-6)

    def test_points_of_white_are_ignored(self) -> None:
        method, batch = method_of().eval(), two_sided_batch()
        white = torch.tensor([[60, 3, 2], [61, 40, 2]])
        more = replace(batch, points=[torch.cat([rows, white]) for rows in batch.need_points()])
        with torch.no_grad():
            for one, other in (
                (method.losses(batch), method.losses(more)),
                (method.explain(batch), method.explain(more)),
            ):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)
            assert torch.equal(method.label_guided(batch)[0], method.label_guided(more)[0])

    def test_explain_shows_each_point_and_how_sure_u_is(self) -> None:
        method, batch = method_of().eval(), two_sided_batch()
        maps = method.explain(batch)
        assert {name: tuple(value.shape) for name, value in maps.items()} == {
            "contrast_maps": (4, 2, 64, 64),
            "point_solutions": (4, 2, 64, 64),
            "u": (4, 2, 64, 64),
            "certainty": (4, 1, 64, 64),
        }
        for name in maps:
            assert maps[name][0].any()
            assert not maps[name][1:].any()
        assert 0.25 <= float(maps["certainty"][0].min()) <= float(maps["certainty"][0].max()) <= 1

    def test_both_sides_of_two_classes(self) -> None:
        method, batch = method_of(sides="both").eval(), two_sided_batch()
        maps = method.explain(batch)
        assert maps["contrast_maps"].shape[1] == 4
        torch.testing.assert_close(maps["u"][0].sum(0), torch.ones(64, 64))

    def test_trunk_works_on_its_own_grid(self) -> None:
        method = method_of(TRUNK).eval()
        batch = replace(fake_batch(LABELS, count=1, height=65, width=97), points=[two_sided_batch().need_points()[0]])
        with torch.no_grad():
            assert method.explain(batch)["u"].shape == (1, 2, 17, 25)
            assert method.predict(batch.images).shape == (1, 3, 65, 97)
            assert method.label_guided(batch).shape == (1, 3, 65, 97)


class TestComparedMethods:
    def test_the_teacher_follows_the_student_and_is_not_trained(self, tmp_path: Path) -> None:
        method = method_of(complement="mean_teacher", keep="last")
        start = {name: value.clone() for name, value in method.network.main.state_dict().items()}
        steps: list[dict[str, Tensor]] = []
        original = CVM.on_train_batch_end

        def note(self: CVM, *words: Any) -> None:
            original(self, *words)
            steps.append({name: value.clone() for name, value in self.network.main.state_dict().items()})

        fit = fit_of(tmp_path, steps=3, round_steps=3)
        with patch.object(CVM, "on_train_batch_end", note):
            method.fit(fit, fake_data(dataset_of()))
        teacher = method.network.teacher
        assert teacher is not None
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
        names = [name for name, _ in teacher.named_parameters()]
        follower = {name: start[name] for name in names}
        for number, student in enumerate(steps, 1):
            decay = min(1 - 1 / (number + 1), 0.99)
            follower = {name: decay * follower[name] + (1 - decay) * student[name] for name in names}
        found = teacher.state_dict()
        for name in names:
            torch.testing.assert_close(found[name], follower[name], rtol=1e-4, atol=1e-6)
        assert not same(follower, start)
        assert not same({name: steps[-1][name] for name in names}, found)

    def test_dual_branch_needs_a_decoder_at_the_resolution_of_the_image(self) -> None:
        network = {"architecture": "fpn", "encoder": {"name": "test_resnet"}}
        with pytest.raises(InputError, match="fpn has not; use architecture: unet") as caught:
            method_of(network, complement="dual_branch")
        assert "\n" not in str(caught.value)

    def test_the_second_branch_is_another_one_and_does_not_predict(self) -> None:
        method, batch = method_of(complement="dual_branch").eval(), two_sided_batch()
        before = method.predict(batch.images)
        assert method.network.auxiliary is not None
        dense, second = method.network.both(batch.images)
        assert second.shape == dense.logits.shape
        assert not torch.allclose(second, dense.logits, atol=1e-3)
        with torch.no_grad():
            for parameter in method.network.auxiliary.parameters():
                parameter.zero_()
        assert torch.equal(method.predict(batch.images), before)

    def test_dual_branch_on_a_trunk_and_odd_sizes(self) -> None:
        method = method_of(TRUNK, complement="dual_branch")
        terms = method.losses(fake_batch(LABELS, count=2, height=65, width=97))
        assert set(terms) == {"partial_cross_entropy", "auxiliary", "pseudo_labels"}
        assert all(bool(value.isfinite()) for value in terms.values())


def test_case_of_the_contract_trains_on_images_without_contrast(tmp_path: Path) -> None:
    """Images of one class only: points train, u is never there."""
    dataset = fake_dataset(LABELS, count=(8, 2, 0), masks=False)
    splits = {}
    for split in ("train", "val"):
        splits[split] = tuple(
            replace(each, points=Points(each.points.rows[each.points.rows[:, 2] == each.points.rows[0, 2]]))
            for each in dataset.splits[split]
        )
    method = MethodCase("cvm", {"network": UNET, "optimization": FAST}).build(LABELS)
    assert isinstance(method, CVM)
    rounds = train(method, tmp_path, replace(dataset, splits=splits), rounds=2, values=(0.9, 0.8))
    assert [each.stored for each in rounds] == [{}, {}]
    assert all(bool(value.isfinite().all()) for value in method.state_dict().values())
