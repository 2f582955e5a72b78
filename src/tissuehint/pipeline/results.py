"""What comes out of the stages of a run: rows of the score table, pictures, the weak/full ratio."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tissuehint.data.module import TissueData
from tissuehint.data.records import Record, read_codes
from tissuehint.metrics import decide
from tissuehint.model import TissueModel
from tissuehint.pipeline.directory import RunDirectory
from tissuehint.pipeline.gallery import Gallery
from tissuehint.pipeline.inference import StageOneMaps, model_maps, pseudo_mask
from tissuehint.pipeline.processes import gather, is_writer
from tissuehint.pipeline.recipe import Recipe
from tissuehint.pipeline.scoring import SplitScores, TissueMapOf, score_split

RATIO_KEYS = ("miou", "dice_mean", "accuracy", "boundary_miou")


class Results:
    """Scores and pictures of trained stages.

    Args:
        recipe: of the run.
        data: its images.
        directory: its files.
        maps: of stage 1, or None where the recipe has none.
        models: of ``stage2`` and ``ceiling``, where the recipe has them.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TissueData,
        directory: RunDirectory,
        maps: StageOneMaps | None,
        models: Mapping[str, TissueModel],
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.labels = data.labels
        self.directory = directory
        self.maps = maps
        self.models = models

    def notes(self) -> list[str]:
        """What a reader of the table must know about what is not in it."""
        lacking = [split for split in self.recipe.evaluation.splits if not self.data.with_masks(split)]
        notes = [f"Split {split} is not scored: none of its images has a mask." for split in lacking]
        grid, tagged = self.recipe.data.patches, self.recipe.method is not None and self.maps is not None
        if tagged and grid is not None and self.data.with_masks("train"):
            share = f"more than {grid.presence:.0%} of a window"
            notes.append(f"Hints of patches are simulated from masks: a class is tagged where it covers {share}.")
        return notes

    def rows(self) -> list[dict[str, Any]]:
        """The score table: each scored split, stage, gate and protocol."""
        maps = self.maps
        rows: list[dict[str, Any]] = []
        name = self.recipe.method.name if self.recipe.method else ""
        for split in self.recipe.evaluation.splits:
            if not self.data.with_masks(split):
                continue
            if maps is not None:
                if maps.method.supervision == "tags" and self.recipe.evaluation.oracle:
                    prior = self._tag_prior
                    tags_only = partial(maps.tags_only, prior=prior)
                    rows += self._score(split, tags_only, stage="tags_only", name="tags", gate="oracle")
                rows += self._score(split, maps.predicted, stage="stage1", name=name, gate="predicted")
                if self.recipe.evaluation.oracle:
                    rows += self._score(split, self._oracle(maps), stage="stage1", name=name, gate="oracle")
            for stage, model in self.models.items():
                label = f"{name} + {self._architecture()}" if stage == "stage2" else f"{self._ceiling()}, masks"
                rows += self._score(split, self._of(model), stage=stage, name=label, gate="none")
        rows += self._pseudo_mask_rows(name)
        return rows

    def _score(self, split: str, tissue_map_of: TissueMapOf, **names: Any) -> list[dict[str, Any]]:
        evaluation = self.recipe.evaluation
        scores = score_split(
            self.data.with_masks(split),
            self.labels,
            tissue_map_of,
            protocols=evaluation.protocols,
            distances=evaluation.boundary_distances,
            progress=self._bar(f"scoring {names['stage']} ({names['gate']}) on {split}"),
        )
        return scores.rows(**names, split=split)

    def _oracle(self, maps: StageOneMaps) -> TissueMapOf:
        """Maps with the hints of the scored image; what no window has a tag for is white, where there is white."""

        def tissue_map_of(record: Record) -> Tensor:
            tissue_map = maps.guided(record)
            if self.labels.white is not None:
                tissue_map[self.labels.white] += (tissue_map.sum(0) == 0).to(tissue_map)
            return tissue_map

        return tissue_map_of

    def _pseudo_mask_rows(self, name: str) -> list[dict[str, Any]]:
        """Pseudo masks against the truth of the training images; pixels that they ignore are left out and reported.

        A mask that says white has no second choice, which A and B would ask for: with white there is only C.
        """
        folder, labels = self.directory.pseudo_masks, self.labels
        records = self.data.with_masks("train")
        if not self.directory.is_done(folder) or not records:
            return []
        ignored: list[float] = []

        def truth_of(record: Record) -> NDArray[np.uint8]:
            unknown = read_codes(folder / f"{record.id}.png") == labels.ignore
            ignored.append(float(unknown.mean()))
            return np.where(unknown, labels.ignore, record.read_mask(labels)).astype(np.uint8)

        def one_hot(record: Record) -> Tensor:
            codes = torch.from_numpy(read_codes(folder / f"{record.id}.png"))
            return torch.stack([codes == index for index in range(labels.num_classes)]).float()

        scores = score_split(
            records,
            labels,
            one_hot,
            protocols=self.recipe.evaluation.protocols if labels.white is None else ("five_class",),
            distances=self.recipe.evaluation.boundary_distances,
            truth_of=truth_of,
            progress=self._bar("scoring pseudo masks"),
        )
        shares = [share for part in gather(ignored) for share in part]
        facts = {"stage": "pseudo_masks", "name": name, "gate": "oracle", "split": "train"}
        return [{**row, "ignored": float(np.mean(shares))} for row in scores.rows(**facts)]

    def gallery(self) -> None:
        """Pictures of some images of the first scored split."""
        maps, models = self.maps, self.models
        gallery = Gallery(self.directory.gallery, self.labels)
        split, count = self.recipe.evaluation.splits[0], self.recipe.evaluation.gallery
        for record in _spread(self.data.records(split), count):
            tissue_map = None if maps is None else maps.predicted(record)
            deployed = models.get("stage2") or (models.get("ceiling") if maps is None else None)
            final = tissue_map if deployed is None else self._of(deployed)(record)
            assert final is not None
            mask = None if record.mask is None else record.read_mask(self.labels)
            prediction = decide(final[None], self.labels.num_tissue, "five_class")[0].cpu().numpy()
            guided, heats = None, {}
            if maps is not None and mask is not None and self.recipe.evaluation.oracle:
                guided = pseudo_mask(maps.guided(record), self.recipe.pseudo_masks.min_confidence, self.labels.ignore)
                heats = maps.explain(record)
            facts = {} if mask is None else {"miou": self._image_miou(final, mask)}
            layers = {"truth": mask, "pseudo_mask": guided, "prediction": prediction}
            gallery.add(record.id, split, self.data.read(record), layers, {"tissue_map": tissue_map}, heats, **facts)
        gallery.finish()

    def _image_miou(self, tissue_map: Tensor, mask: NDArray[np.uint8]) -> float:
        scores = SplitScores(self.labels, ("five_class",))  # as the picture of the prediction
        scores.update(tissue_map, mask)
        return float(scores.rows()[0]["miou"])

    @cached_property
    def _tag_prior(self) -> Tensor:
        """How often each class is tagged in training, (C,)."""
        hints = self.data.hints("train", "tags")
        assert hints.tags is not None
        return torch.from_numpy(hints.tags.astype(np.float32).mean(0))

    def _architecture(self) -> str:
        return self.recipe.stage2.network.architecture if self.recipe.stage2 else ""

    def _ceiling(self) -> str:
        full = self.recipe.full_supervision
        return full.network.architecture if full else ""

    def _of(self, model: TissueModel) -> TissueMapOf:
        return model_maps(model, self.data, self.recipe.evaluation.batch_size)

    def _bar(self, text: str) -> str | None:
        return text if self.recipe.trainer.progress and is_writer() else None


def weak_full_ratio(rows: list[dict[str, Any]]) -> dict[str, float | str] | None:
    """Score of what is kept over that of the network trained with masks, first scored split and protocol.

    What is kept is stage 2, or the method itself (without labels) where it is the only stage.
    """

    def first(stage: str, gate: str | None = None) -> dict[str, Any] | None:
        return next((row for row in rows if row["stage"] == stage and gate in (None, row.get("gate"))), None)

    weak, full = first("stage2") or first("stage1", "predicted"), first("ceiling")
    if weak is None or full is None:
        return None
    ratios = {key: weak[key] / full[key] if full[key] else float("nan") for key in RATIO_KEYS}
    return {**ratios, "split": weak["split"], "protocol": weak["protocol"]}


def rows_of_model(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the model that is kept: stage 2, else the method without labels, else the network trained with masks."""
    for stage, gate in (("stage2", "none"), ("stage1", "predicted"), ("ceiling", "none")):
        found = [row for row in rows if (row["stage"], row["gate"]) == (stage, gate)]
        if found:
            return found
    return []


def _spread(records: tuple[Record, ...], count: int) -> list[Record]:
    """``count`` records, evenly spread over the split."""
    places = np.unique(np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int))
    return [records[index] for index in places] if len(records) else []
