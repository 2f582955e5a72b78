"""CVM as a weak method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from tissuehint.data.module import Supervision, TissueData
from tissuehint.data.samples import Batch, Sample, collate
from tissuehint.data.training_sets import GuidedSet, HintSet
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import MethodConfig, Training, WeakMethod
from tissuehint.methods.cvm.comparators import teacher_decay, update_teacher
from tissuehint.methods.cvm.complement import combine, complement, solve, target_classes
from tissuehint.methods.cvm.config import STORED, CVMConfig
from tissuehint.methods.cvm.losses import (
    certainty,
    grid_points,
    hard_cross_entropy,
    partial_cross_entropy,
    weighted_kl,
)
from tissuehint.methods.cvm.model import CVMNetwork
from tissuehint.methods.cvm.stepwise import STEPWISE, Step
from tissuehint.methods.cvm.store import Store
from tissuehint.nn.optimization import build_optimizer

VALIDATION = "val_partial_cross_entropy"
# most points of an image that ``explain`` shows
SHOWN_POINTS = 8


class CVM(WeakMethod):
    """Train a network on a few points and on the variational segmentation that they and its features give.

    Source: Zhang, Burrows et al., Weakly supervised segmentation with point annotations for histopathology images via
    contrast-based variational model, CVPR 2023.
    """

    supervision: ClassVar[Supervision] = "points"
    Config: ClassVar[type[MethodConfig]] = CVMConfig
    config: CVMConfig

    def __init__(self, config: CVMConfig, labels: LabelSpace) -> None:
        super().__init__(config, labels)
        self.targets = target_classes(config, labels)
        self.network = CVMNetwork(config, labels.num_tissue)
        self.store: Store | None = None
        self.items: HintSet | None = None
        self.item_batch = 1
        self.lowest = float("inf")
        self.refresh: int | None = None

    # ---- training -------------------------------------------------------------------------------------------------

    def fit(self, run: Training, data: TissueData) -> None:
        """One fit; the items carry the u that is stored for them."""
        items = data.hints("train", self.supervision)
        validation = self._validation(data)
        guided = self.config.complement in STORED
        self.store = Store(run.folder / "complement") if guided else None
        self.items, self.item_batch = items, run.batch_size
        training = GuidedSet(items, self.store, self.labels.num_tissue) if self.store else items
        data.train_on(training, batch_size=run.batch_size, round_steps=run.round_steps, validation=validation)
        keep = self.config.keep == "lowest" and validation is not None
        run.fit(self, data, keep_lowest=VALIDATION if keep else None)
        if self.store is not None and self.trainer.is_global_zero:
            self.store.drop_all_but(self.refresh)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Partial cross-entropy on the points (Eq. 3), and what ``config.complement`` adds (Eq. 2)."""
        config = self.config
        if config.complement in STEPWISE:
            grid = self._grid(batch)
            points = self._points(batch, grid)
            step = Step(self.network, batch.images, points, config.point_radius, self._progress())
            dense, more = STEPWISE[config.complement](step)
            more = {name: config.complement_weight * term for name, term in more.items()}
        else:
            dense, more = self.network.dense(batch.images), {}
            points = self._points(batch, _size(dense.logits))
        log_probabilities = dense.logits.float().log_softmax(1)
        terms = {"partial_cross_entropy": partial_cross_entropy(log_probabilities, points, config.point_radius), **more}
        if config.complement in STORED and batch.guides is not None:
            u = self._to_grid(batch.guides, _size(dense.logits))
            follow = weighted_kl if config.consistency == "weighted_kl" else hard_cross_entropy
            terms[config.consistency] = config.complement_weight * follow(log_probabilities, u)
        return terms

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Any, batch_idx: int) -> None:
        """The slow copy follows."""
        if self.network.teacher is not None:
            update_teacher(self.network.teacher, self.network.main, teacher_decay(self.global_step))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Logs the partial cross-entropy on validation points, which decides about refresh and kept weights."""
        dense = self.network.dense(batch.images)
        points = self._points(batch, _size(dense.logits))
        value = partial_cross_entropy(dense.logits.float().log_softmax(1), points, self.config.point_radius)
        pointed = sum(len(rows) > 0 for rows in points)  # images without point don't count as 0
        self.log(VALIDATION, value, prog_bar=True, on_epoch=True, batch_size=pointed, sync_dist=True)

    def on_train_epoch_end(self) -> None:
        """Make u anew for all items where the validation partial cross-entropy is the lowest so far (Section 4.3.2).

        Without validation images u is made anew after each round.
        """
        value = self.trainer.callback_metrics.get(VALIDATION)
        if value is not None:
            if not float(value) < self.lowest:  # NaN is no minimum
                return
            self.lowest = float(value)
        if self.store is None:
            return
        number = self.trainer.current_epoch
        if self.trainer.is_global_zero:
            self.store.drop_all_but(self.refresh)
        self.trainer.strategy.barrier()
        self._refresh(self.store, number)
        self.trainer.strategy.barrier()
        self.refresh = number
        self._publish()

    def on_train_start(self) -> None:
        """A run that goes on reads the u of its checkpoint, one that begins none."""
        self._publish()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which u belongs to these weights."""
        checkpoint["cvm"] = {"lowest": self.lowest, "refresh": self.refresh}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of ``on_save_checkpoint``."""
        state: Mapping[str, Any] = checkpoint["cvm"]
        self.lowest, self.refresh = float(state["lowest"]), state["refresh"]

    def configure_optimizers(self) -> Any:
        """Encoder (or trunk) at the base rate, all else at the head rate."""
        return build_optimizer(self.config.optimization, self.network, self.total_steps())

    # ---- tissue maps ----------------------------------------------------------------------------------------------

    def predict(self, images: Tensor) -> Tensor:
        """Tissue map of the network alone."""
        shares = self.config.refine(self.network(images).float().softmax(1), images)
        return self.config.split_white(shares, images, self.labels)

    def label_guided(self, batch: Batch) -> Tensor:
        """Tissue map of u, from the points of the image and the features of the network.

        Where the points are of one class only there is no contrast, and where ``config.complement`` makes no u there is
        none: then it is the network's own output.
        """
        dense = self.network.dense(batch.images)
        points = self._points(batch, _size(dense.logits))
        size = _size(batch.images)
        own = self.network(batch.images).float().softmax(1)
        if self.config.complement in STORED:
            u = complement(self.config, self.targets, dense.features, dense.logits, points)
            u = F.interpolate(u.to(own), self.network.main.covered(*size), mode="bilinear", align_corners=False)
            u = u[..., : size[0], : size[1]]
            said = u.flatten(1).any(1)[:, None, None, None]
            own = torch.where(said, u / u.sum(1, keepdim=True).clamp_min(1e-8), own)
        hinted = torch.tensor([len(rows) > 0 for rows in batch.need_points()], device=own.device)
        shares = self.config.refine(own * hinted[:, None, None, None], batch.images)
        return self.config.split_white(shares, batch.images, self.labels)

    @torch.no_grad()
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """How u comes about, on the working grid.

        ``contrast_maps``: (B,n,h,w) z_p of the first n in-target points, ``point_solutions``: their u_p, both 0 where
        an image has fewer; ``u``: (B,C,h,w); ``certainty``: its weight (B,1,h,w), 0 where there is no u.
        """
        dense = self.network.dense(batch.images)
        points = self._points(batch, _size(dense.logits))
        features, probabilities = dense.features.float(), dense.logits.float().softmax(1)
        found = solve(self.config, self.targets, features, probabilities, points)
        batch_size, classes, height, width = probabilities.shape
        u = combine(found, self.targets, (batch_size, classes, height, width))
        counts = torch.bincount(found.image, minlength=batch_size)
        shown = max(1, min(SHOWN_POINTS, int(counts.max()) if len(counts) else 1))
        maps = {name: features.new_zeros(batch_size, shown, height, width) for name in ("contrast", "u")}
        for index in range(batch_size):
            own = (found.image == index).nonzero()[:shown, 0]
            maps["contrast"][index, : len(own)] = found.contrast[own]
            maps["u"][index, : len(own)] = found.u[own]
        weight = certainty(u) * (u.sum(1) > 0)
        return {
            "contrast_maps": maps["contrast"],
            "point_solutions": maps["u"],
            "u": u,
            "certainty": weight[:, None],
        }

    # ---- small parts ----------------------------------------------------------------------------------------------

    def _validation(self, data: TissueData) -> HintSet | None:
        """Validation items; None where no image of them has a point of a tissue class, which could decide nothing."""
        if not data.records("val"):
            return None
        items = data.hints("val", self.supervision)
        classes = [record.points.rows[:, 2] for record in items.records if record.points is not None]
        return items if any((each < self.labels.num_tissue).any() for each in classes) else None

    def _points(self, batch: Batch, grid: tuple[int, int]) -> list[Tensor]:
        """Points of tissue classes in cells of the working grid; white is found by its rule, not learnt."""
        covered = self.network.main.covered(*_size(batch.images))
        tissue = [rows[rows[:, 2] < self.labels.num_tissue] for rows in batch.need_points()]
        return [grid_points(rows, covered, grid) for rows in tissue]

    def _to_grid(self, guides: Tensor, grid: tuple[int, int]) -> Tensor:
        """Guides (B,C,H,W) of images as means over the cells of the working grid."""
        height, width = _size(guides)
        tall, wide = self.network.main.covered(height, width)
        return F.interpolate(F.pad(guides, (0, wide - width, 0, tall - height)), grid, mode="area")

    def _grid(self, batch: Batch) -> tuple[int, int]:
        return self.network.main.grid(*_size(batch.images))

    def _progress(self) -> float:
        if getattr(self, "_trainer", None) is None:  # losses are asked for outside training
            return 0.0
        return min(1.0, self.global_step / max(self.total_steps(), 1))

    @torch.no_grad()
    def _refresh(self, store: Store, number: int) -> None:
        """Make and keep u of the items of this process, in evaluation mode and without augmentation."""
        self.eval()
        for samples in self._own_items():
            batch = collate(samples).to(self.device)
            dense = self.network.dense(batch.images)
            points = self._points(batch, _size(dense.logits))
            u = complement(self.config, self.targets, dense.features, dense.logits, points)
            covered = self.network.main.covered(*_size(batch.images))
            for sample, values in zip(samples, u, strict=True):
                if bool(values.any()):
                    store.write(number, sample.id, values, covered)
        self.train()

    def _own_items(self) -> Iterator[list[Sample]]:
        """Items of this process, as many of one size at a time as a step has."""
        assert self.items is not None
        waiting: list[Sample] = []
        for index in range(self.global_rank, len(self.items), self.trainer.world_size):
            sample = self.items.sample(index)
            if waiting and (sample.image.shape != waiting[0].image.shape or len(waiting) == self.item_batch):
                yield waiting
                waiting = []
            waiting.append(sample)
        if waiting:
            yield waiting

    def _publish(self) -> None:
        if self.store is not None:
            if self.trainer.is_global_zero:
                self.store.publish(self.refresh)
            self.trainer.strategy.barrier()


def _size(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
