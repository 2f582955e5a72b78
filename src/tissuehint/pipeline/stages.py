"""Recipe -> stage 1 -> pseudo masks -> stage 2 -> scores -> report -> model; each stage is done once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tissuehint.data.folds import fold_dataset
from tissuehint.data.module import TissueData, load_dataset
from tissuehint.data.patches import PatchGrid
from tissuehint.errors import InputError
from tissuehint.files import finite, write_json, write_palette_png
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import WeakMethod
from tissuehint.model import CARD_FILE, TissueModel
from tissuehint.pipeline.cross_validation import chosen_fold, cross_validate
from tissuehint.pipeline.directory import RunDirectory, write_environment
from tissuehint.pipeline.inference import StageOneMaps, inference_device, model_maps, pseudo_mask
from tissuehint.pipeline.processes import connected, is_writer, share, wait_for_all
from tissuehint.pipeline.recipe import Recipe, load_recipe
from tissuehint.pipeline.results import Results, rows_of_model, weak_full_ratio
from tissuehint.pipeline.scoring import score_split, track
from tissuehint.pipeline.start import SourceRun, source_folder
from tissuehint.pipeline.training import CHECKPOINT, WEIGHTS, Fit, check_trainer, load_weights, save_weights
from tissuehint.plugins import load_method
from tissuehint.report import write_report
from tissuehint.segmentation import SegmentationConfig, SegmentationModule


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Args:
        path: the run directory; of a cross-validation the directory that holds those of its folds.
        scores: content of ``scores.json``; None where a score is not defined. Of a cross-validation each score is
            ``{"mean", "std", "values"}``, values in the order of the folds.
    """

    path: Path
    scores: dict[str, Any]

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.path / "report.html"

    def model(self) -> TissueModel:
        """The model to keep.

        Raises:
            InputError: the result of a cross-validation, which has a model in each fold and none for all.
        """
        return TissueModel.load(self.path / "model")


def run(recipe: Recipe | Mapping[str, Any] | Path | str, **overrides: Any) -> RunResult:
    """Run a recipe from start to end, or from where a killed run of it stopped.

    Args:
        recipe: a YAML file, the name of a recipe that comes with tissuehint, a mapping, or a ``Recipe``.
        overrides: recipe values; ``stage1__steps=100`` or ``**{"stage1.steps": 100}``; a mapping is merged.

    Returns:
        The run directory and its scores.

    Raises:
        InputError: a recipe, data set or weights file that breaks a rule; nothing is half-written.

    Example:
        ``tissuehint.run("cam/phantom", seed=1).scores["weak_full_ratio"]``
    """
    checked = load_recipe(recipe, overrides)
    if checked.cross_validation is None:
        return Experiment(checked).run()
    if checked.cross_validation.fold is not None:
        return Experiment(chosen_fold(checked)).run()
    return RunResult(*cross_validate(checked, lambda fold: Experiment(fold).run().scores))


class Experiment:
    """The stages of one recipe.

    Args:
        recipe: checked; with ``cross_validation`` it is that of one fold.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.directory = RunDirectory.open(recipe, writer=False)
        dataset = load_dataset(recipe.data)
        if recipe.cross_validation is not None:
            dataset = fold_dataset(dataset, recipe.cross_validation)
        self.data = TissueData(dataset, recipe.data, recipe.seed)
        self.device = inference_device(recipe.trainer)
        if not self.data.records("train"):
            raise InputError(f"data set {dataset.name}", "has no training images", "check the split")

    @property
    def labels(self) -> LabelSpace:
        """Classes of the data set."""
        return self.data.labels

    def run(self) -> RunResult:
        """All stages; finished ones are skipped."""
        recipe = self.recipe
        finished = self._finished()
        if finished is not None:
            return finished
        # meet everything that can refuse the recipe before the first file is written
        check_trainer(recipe.trainer)
        self.data.check_masks()
        weak = recipe.data.labels is None
        method = self._method() if weak else None
        stage2 = self._network(recipe.stage2) if recipe.stage2 is not None and weak else None
        full = recipe.full_supervision
        ceiling = self._network(full) if full is not None else None
        self._check_masks(ceiling is not None)
        self._start({"stage1": method, "stage2": stage2, "ceiling": ceiling})
        RunDirectory.open(recipe, writer=is_writer())
        if is_writer():
            write_environment(self.directory, recipe.seed, self.data.dataset.notes)
        if method is not None:
            self._stage_one(method)
        if method is not None and stage2 is not None:
            self._pseudo_masks(method)
            self._stage_two(stage2, self.directory.stage2, weak=True)
        if ceiling is not None:
            self._stage_two(ceiling, self.directory.ceiling, weak=False)
        return self._finish(method, stage2, ceiling)

    def _finished(self) -> RunResult | None:
        """What an earlier run of this recipe left, if it left everything and was scored in the way asked for now."""
        run = self.directory
        if not all(path.is_file() for path in (run.scores, run.report, run.model / CARD_FILE)):
            return None
        scores: dict[str, Any] = json.loads(run.scores.read_text(encoding="utf-8"))
        if scores.get("evaluation") != self.recipe.evaluation.model_dump(mode="json"):
            return None
        return RunResult(run.path, scores)

    def _check_masks(self, ceiling: bool) -> None:
        """Raise ``InputError`` where the recipe asks for what only masks can give."""
        lacking = [record.id for record in self.data.records("train") if record.mask is None]
        if ceiling and lacking:
            key = "ceiling" if self.recipe.data.labels is None else "data.labels: masks"
            rule = f"trains with masks, but {len(lacking)} training images have none, such as {lacking[0]}"
            raise InputError(f"recipe key {key}", rule, "give their masks, or leave the key out")
        for key, network in (("stage2", self.recipe.stage2), ("ceiling", self.recipe.full_supervision)):
            if network is not None and network.keep == "best" and not self.data.with_masks("val"):
                rule = "keeps the round with the best score on val, but no val image has a mask"
                fix = "write keep: last, or give val images with masks"
                raise InputError(f"recipe key {key}.keep = best", rule, fix)

    # ---- stages -------------------------------------------------------------------------------------------------

    def _method(self) -> WeakMethod:
        config = self.recipe.method
        assert config is not None
        torch.manual_seed(self.recipe.seed)
        method: WeakMethod = load_method(config.name)(config, self.labels)
        return method

    def _network(self, config: SegmentationConfig) -> SegmentationModule:
        torch.manual_seed(self.recipe.seed)  # the same start for pseudo masks and masks
        return SegmentationModule(config, self.labels)

    def _start(self, modules: Mapping[str, L.LightningModule | None]) -> None:
        """Put the weights of ``start_from`` into the modules of the stages that are not begun."""
        if self.recipe.start_from is None:
            return
        # before ``prepare``, so that what a method makes from the images of this run stays
        todo = {name: module for name, module in modules.items() if module is not None and not self._begun(name)}
        if todo:
            source = SourceRun(self.recipe.start_from, self.labels)
            for name, module in todo.items():
                source.into(module, name)

    def _begun(self, stage: str) -> bool:
        folder = self.directory.path / stage
        return self.directory.is_done(folder) or (folder / "checkpoints" / CHECKPOINT).is_file()

    def _stage_one(self, method: WeakMethod) -> None:
        run, budget = self.directory, self.recipe.stage1
        if run.is_done(run.stage1):
            load_weights(method, run.stage1 / WEIGHTS)
            return
        method.prepare(self.data, run.stage1 / "prepared")
        fit = Fit(
            run.stage1,
            steps=budget.steps,
            batch_size=budget.batch_size,
            round_steps=budget.round_steps,
            settings=self.recipe.trainer,
            seed=self.recipe.seed,
        )
        method.fit(fit, self.data)
        self._close(method, fit)

    def _stage_two(self, module: SegmentationModule, folder: Path, *, weak: bool) -> None:
        if self.directory.is_done(folder):
            load_weights(module, folder / WEIGHTS)
            return
        config = module.config
        fit = Fit(
            folder,
            steps=config.steps,
            batch_size=config.batch_size,
            round_steps=config.round_steps,
            settings=self.recipe.trainer,
            seed=self.recipe.seed,
            validate=self._validation_miou if self.data.with_masks("val") else None,
            keep_best=config.keep == "best",
        )
        masks = (
            self.data.pseudo_masks(self.directory.pseudo_masks, config.crop)
            if weak
            else self.data.true_masks(config.crop)
        )
        fit.fit(module, self.data.train_on(masks, batch_size=config.batch_size, round_steps=fit.round_steps))
        self._close(module, fit)

    def _close(self, module: L.LightningModule, fit: Fit) -> None:
        if is_writer():
            save_weights(module, fit.folder / WEIGHTS)
            facts: dict[str, Any] = {"seconds": round(fit.seconds, 1), "steps": fit.steps, "batch_size": fit.batch_size}
            if self.recipe.start_from is not None:
                facts["start_from"] = str(source_folder(self.recipe.start_from).resolve() / fit.folder.name)
            self.directory.mark_done(fit.folder, **facts)
            for checkpoint in (fit.folder / "checkpoints").glob("*"):
                checkpoint.unlink()
        wait_for_all()
        if connected():  # buffers such as the means of batch norm are each process's own until here
            load_weights(module, fit.folder / WEIGHTS)

    def _pseudo_masks(self, method: WeakMethod) -> None:
        """One palette PNG a training image; each process makes its share, images that have theirs are left alone."""
        run, rules = self.directory, self.recipe.pseudo_masks
        if run.is_done(run.pseudo_masks):
            return
        maps = self._stage_one_maps(method, rules.stride)
        records = self.data.records("train")
        todo = [record for record in share(records) if not (run.pseudo_masks / f"{record.id}.png").is_file()]
        for record in track(todo, self._bar("pseudo masks")):
            mask = pseudo_mask(maps.guided(record), rules.min_confidence, self.labels.ignore)
            write_palette_png(run.pseudo_masks / f"{record.id}.png", mask, self.labels.palette())
        wait_for_all()
        if is_writer():
            run.mark_done(run.pseudo_masks, images=len(records))
        wait_for_all()

    # ---- scores, model, report ----------------------------------------------------------------------------------

    def _finish(
        self, method: WeakMethod | None, stage2: SegmentationModule | None, ceiling: SegmentationModule | None
    ) -> RunResult:
        models = {
            name: self._network_model(module).to(self.device)
            for name, module in (("stage2", stage2), ("ceiling", ceiling))
            if module is not None
        }
        maps = None if method is None else self._stage_one_maps(method, self.recipe.evaluation.stride)
        deployed = models.get("stage2") or (None if method is None else self._method_model(method))
        deployed = deployed or models["ceiling"]
        results = Results(self.recipe, self.data, self.directory, maps, models)
        rows = results.rows()
        scores: dict[str, Any] = {
            "format": 1,
            "run": self.recipe.name,
            "seed": self.recipe.seed,
            "labels": self.labels.to_dict(),
            "evaluation": self.recipe.evaluation.model_dump(mode="json"),
            "rows": rows,
            "published": self.recipe.published,
            "notes": [*self.data.dataset.notes, *self._notes(), *results.notes()],
            "weak_full_ratio": weak_full_ratio(rows),
        }
        if is_writer():
            deployed.notes["scores"] = rows_of_model(rows)
            deployed.save(self.directory.model)
            results.gallery()
            if method is not None:
                method.illustrate(self.data, self.directory.stage1 / "illustrated")
            write_json(self.directory.scores, scores)
            write_report(self.directory.path)
        wait_for_all()
        return RunResult(self.directory.path, finite(scores))

    def _notes(self) -> list[str]:
        """What a reader of the scores must know about how the training was begun."""
        recipe, notes = self.recipe, []
        if recipe.data.train_fraction is not None:
            drawn, whole = len(self.data.records("train")), len(self.data.dataset.splits["train"])
            notes.append(f"Trained on {drawn} of {whole} training images, drawn at random (data.train_fraction).")
        if recipe.start_from is not None:
            notes.append(f"All trained weights started from those of the run {recipe.start_from}.")
        return notes

    # ---- small parts --------------------------------------------------------------------------------------------

    def _stage_one_maps(self, method: WeakMethod, stride: int | None) -> StageOneMaps:
        grid = _with_stride(self.recipe.data.patches, stride)
        return StageOneMaps(method, self.data, grid, self.recipe.evaluation.batch_size, self.device)

    def _network_model(self, module: SegmentationModule) -> TissueModel:
        config = module.config
        grid = None if config.crop is None else PatchGrid(side=config.crop, stride=config.stride or config.crop)
        return TissueModel.from_network(module.network, self.labels, config.network, grid=grid, **self._origin())

    def _method_model(self, method: WeakMethod) -> TissueModel:
        grid = _with_stride(self.recipe.data.patches, self.recipe.evaluation.stride)
        return TissueModel.from_method(method, grid=grid, **self._origin())

    def _origin(self) -> dict[str, Any]:
        sizes = {record.um_per_px for record in self.data.records("train")}
        um_per_px = sizes.pop() if len(sizes) == 1 else None
        return {"um_per_px": um_per_px, "notes": {"run": self.recipe.name, "data": self.data.dataset.name}}

    def _validation_miou(self, module: L.LightningModule) -> float:
        assert isinstance(module, SegmentationModule)
        model = self._network_model(module)
        scores = score_split(
            self.data.with_masks("val"),
            self.labels,
            model_maps(model, self.data, self.recipe.evaluation.batch_size),
            protocols=("ignore_white",),
        )
        return float(scores.rows()[0]["miou"])

    def _bar(self, text: str) -> str | None:
        return text if self.recipe.trainer.progress and is_writer() else None


def _with_stride(grid: PatchGrid | None, stride: int | None) -> PatchGrid | None:
    return grid if grid is None or stride is None else PatchGrid(**{**grid.model_dump(), "stride": stride})
