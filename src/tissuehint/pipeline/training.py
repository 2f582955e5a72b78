"""One Lightning fit that can be killed at any moment and ends in the same result."""

from __future__ import annotations

import csv
import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from tissuehint.data.module import TissueData
from tissuehint.errors import InputError
from tissuehint.files import atomic_path, write_text
from tissuehint.pipeline.processes import is_writer, wait_for_all
from tissuehint.pipeline.recipe import TrainerSettings

CHECKPOINT = "last.ckpt"
WEIGHTS = "weights.safetensors"
BEST_WEIGHTS = "best.safetensors"
METRICS = "metrics.csv"

Validation = Callable[[L.LightningModule], float]


class Fit:
    """What ``WeakMethod.fit`` and stage 2 train with.

    Args:
        folder: of the stage; logs, checkpoint and weights go here.
        steps: optimiser steps.
        batch_size: over all devices.
        round_steps: steps between two validations and checkpoints; at a kill at most one round is lost.
        settings: passed to Lightning.
        seed: of everything random inside the network.
        validate: validation mIoU of the module, or None.
        keep_best: end with the weights of the best round instead of the last.
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        batch_size: int,
        round_steps: int,
        settings: TrainerSettings,
        seed: int,
        validate: Validation | None = None,
        keep_best: bool = False,
    ) -> None:
        self.folder = folder
        self.batch_size = batch_size
        self.round_steps = min(round_steps, steps)
        # whole rounds, so that a resumed run starts at the first step of one
        self.steps = max(1, round(steps / self.round_steps)) * self.round_steps
        self.settings = settings
        self.seed = seed
        self.validate = validate
        self.keep_best = keep_best and validate is not None
        self._seconds = 0.0
        self._phases: list[Fit] = []
        self._is_phase = False

    @property
    def seconds(self) -> float:
        """Spent in training by this process, in all phases."""
        return self._seconds + sum(phase.seconds for phase in self._phases)

    def phase(
        self, name: str, *, steps: int | None = None, batch_size: int | None = None, round_steps: int | None = None
    ) -> Fit:
        """A training that is one of several of a method, in a folder of its own and done once.

        Args:
            name: of the phase, and of its folder.
            steps, batch_size, round_steps: its budget; None takes that of the whole.
        """
        phase = Fit(
            self.folder / name,
            steps=steps or self.steps,
            batch_size=batch_size or self.batch_size,
            round_steps=round_steps or self.round_steps,
            settings=self.settings,
            seed=self.seed,
        )
        phase._is_phase = True
        self._phases.append(phase)
        return phase

    def fit(self, module: L.LightningModule, data: TissueData, *, keep_lowest: str | None = None) -> None:
        """Train ``module``; resumes from the last finished round if there is one.

        Args:
            module: what is trained.
            data: after ``train_on``.
            keep_lowest: name of a value that ``module`` logs once a round on validation hints; training ends with the
                weights of the round where it was lowest. None ends with the last weights.
        """
        started = time.monotonic()
        finished = self.folder / WEIGHTS
        if self._is_phase and finished.is_file():
            load_weights(module, finished)
            return
        resume = self._checkpoint()
        if getattr(module, "channels_last", False):
            # the order in memory in which convolutions train fastest, on the CPU (docs/benchmarks.md) and on GPUs
            module.to(memory_format=torch.channels_last)
        best: RoundValidation | LowestRound | None = None
        if keep_lowest is not None:
            best = LowestRound(self.folder, keep_lowest)
        elif self.validate is not None:
            best = RoundValidation(self.folder, self.validate, keep_best=self.keep_best)
        with _quiet():
            trainer = self._trainer(best)
            try:
                with _ctrl_c(trainer):
                    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
            finally:
                if is_writer():
                    merge_logs(self.folder)
        # what a model loaded from disk has: a trained and a loaded one must predict the same to the last bit
        module.to(memory_format=torch.contiguous_format)
        wait_for_all()
        if best is not None and best.keep_best:
            best.restore(module)
        if self._is_phase:
            self._close_phase(module)
        self._seconds += time.monotonic() - started

    def _close_phase(self, module: L.LightningModule) -> None:
        """Its weights say that a phase is done; with them in place no checkpoint is needed."""
        if is_writer():
            save_weights(module, self.folder / WEIGHTS)
            for checkpoint in (self.folder / "checkpoints").glob("*"):
                checkpoint.unlink()
        wait_for_all()
        load_weights(module, self.folder / WEIGHTS)  # buffers are each process's own until here

    def _checkpoint(self) -> str | None:
        """The last finished round of an earlier, killed fit."""
        path = self.folder / "checkpoints" / CHECKPOINT
        if not path.is_file():
            return None
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch each have their own for a damaged file
            rule = f"is damaged ({type(error).__name__}), so training cannot go on from it"
            raise InputError(path, rule, "delete it, and the stage starts anew") from None
        return str(path)

    def _trainer(self, best: RoundValidation | LowestRound | None) -> L.Trainer:
        settings = self.settings
        callbacks: list[Callback] = [SeedEachStep(self.seed), LearningRateMonitor("step"), DataWait()]
        if best is not None:
            callbacks.append(best)
        callbacks.append(
            ModelCheckpoint(
                self.folder / "checkpoints",
                filename=Path(CHECKPOINT).stem,
                every_n_epochs=1,
                save_top_k=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
        )
        if settings.progress:
            callbacks.append(RichProgressBar(leave=True))
        return L.Trainer(
            # counted in rounds: with max_steps Lightning enters the finished round again on resume and skips the next
            max_epochs=self.steps // self.round_steps,
            **_passed_through(settings),
            callbacks=callbacks,
            plugins=[WholeCheckpoints()],
            logger=self._loggers(),
            log_every_n_steps=min(10, self.round_steps),
            num_sanity_val_steps=0,
            enable_progress_bar=settings.progress,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=self.folder,
        )

    def _loggers(self) -> list[Any]:
        attempts = self.folder / "logs"
        number = len(list(attempts.glob("attempt_*"))) if attempts.is_dir() else 0
        loggers: list[Any] = [
            CSVLogger(attempts, name="", version=f"attempt_{number:03d}", flush_logs_every_n_steps=50)
        ]
        if self.settings.tensorboard:
            from lightning.pytorch.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(self.folder / "tensorboard", name="", version=""))
        return loggers


def check_trainer(settings: TrainerSettings) -> None:
    """Raise ``InputError`` where Lightning refuses the settings; nothing is started or written."""
    if settings.tensorboard and find_spec("tensorboard") is None:
        fix = "install the extra (uv sync --extra tensorboard), or leave it out"
        raise InputError("recipe key trainer.tensorboard", "needs tensorboard, which is not installed", fix)
    try:
        with _quiet():
            L.Trainer(
                **_passed_through(settings),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())[:160]
        fix = "see lightning.Trainer for what accelerator, devices, strategy and precision may be"
        raise InputError("recipe key trainer", f"is refused by Lightning ({reason})", fix) from None


def _passed_through(settings: TrainerSettings) -> dict[str, Any]:
    return settings.model_dump(include={"accelerator", "devices", "num_nodes", "strategy", "precision"})


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or absent, also when the disk fills up."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the target, then rename."""
        with atomic_path(Path(path)) as part:
            torch.save(checkpoint, part)


class SeedEachStep(Callback):
    """Makes what is random inside the network (dropout, drop path) a function of seed and step, for exact resume."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """Seed torch from (seed, step, rank)."""
        key = [self.seed, trainer.global_step, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


class DataWait(Callback):
    """Logs the share of the time that training waits for data, so that a slow loader is seen."""

    def __init__(self) -> None:
        self.waited = self.worked = 0.0
        self.since = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A round begins; its first batch is not counted, since the workers start then."""
        self.waited = self.worked = 0.0
        self.since = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """Data is there."""
        now = time.monotonic()
        self.waited += now - self.since if self.since else 0.0
        self.since = now

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The step is done."""
        now = time.monotonic()
        self.worked += now - self.since
        self.since = now

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the share of the round."""
        total = self.waited + self.worked
        module.log("data_wait", self.waited / total if total else 0.0, rank_zero_only=True)


class RoundValidation(Callback):
    """Validation mIoU after each round; keeps the weights of the best round."""

    def __init__(self, folder: Path, validate: Validation, *, keep_best: bool) -> None:
        self.folder = folder
        self.validate = validate
        self.keep_best = keep_best
        self.best = -1.0

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Score the validation split in every process, write in the first."""
        module.eval()
        with torch.no_grad():
            score = self.validate(module)
        module.train()
        module.log("val_miou", score, prog_bar=True, rank_zero_only=True)
        if self.keep_best and (score > self.best or self.best < 0):  # NaN where no pixel of val is labelled
            self.best = score if score == score else 0.0
            if is_writer():
                save_weights(module, self.folder / BEST_WEIGHTS)

    def restore(self, module: L.LightningModule) -> None:
        """Put the weights of the best round back."""
        load_weights(module, self.folder / BEST_WEIGHTS)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.best = float(state["best"])


class LowestRound(Callback):
    """Keeps the weights of the round in which a logged value was lowest."""

    keep_best = True

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.lowest = float("inf")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The validation loop of the round is done; the value is the same in every process."""
        value = float(trainer.callback_metrics[self.name])
        # the first round counts even where its value is NaN, so that there always is one to go back to
        if value < self.lowest or not (self.folder / BEST_WEIGHTS).is_file():
            self.lowest = value if value == value else float("inf")
            if is_writer():
                save_weights(module, self.folder / BEST_WEIGHTS)

    def restore(self, module: L.LightningModule) -> None:
        """Put the weights of the best round back."""
        load_weights(module, self.folder / BEST_WEIGHTS)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"lowest": self.lowest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.lowest = float(state["lowest"])


def save_weights(module: L.LightningModule, path: Path) -> None:
    """Write the state of a module as safetensors, atomically."""
    from safetensors.torch import save_file

    state: dict[str, Tensor] = {
        key: value.detach().cpu().contiguous().clone() for key, value in module.state_dict().items()
    }
    with atomic_path(path) as part:
        save_file(state, str(part))


def load_weights(module: L.LightningModule, path: Path) -> None:
    """Inverse of ``save_weights``."""
    from safetensors.torch import load_file

    module.load_state_dict(load_file(str(path)))


def merge_logs(folder: Path) -> None:
    """Write one ``metrics.csv`` from the logs of all attempts; where a resumed attempt did a step again, it counts."""
    rows: list[dict[str, str]] = []
    for log in sorted((folder / "logs").glob("attempt_*/metrics.csv")):
        with log.open(newline="") as file:
            attempt = list(csv.DictReader(file))
        if attempt:
            first = min(int(row["step"]) for row in attempt)
            rows = [row for row in rows if int(row["step"]) < first] + attempt
    if not rows:
        return
    rows.sort(key=lambda row: int(row["step"]))
    columns = list(dict.fromkeys(["epoch", "step", *sorted({key for row in rows for key in row})]))
    lines = [",".join(columns)] + [",".join(row.get(key) or "" for key in columns) for row in rows]
    write_text(folder / METRICS, "\n".join(lines) + "\n")


@contextmanager
def _ctrl_c(trainer: L.Trainer) -> Iterator[None]:
    """Ctrl-C is a ``KeyboardInterrupt``; Lightning makes ``SystemExit`` of it and leaves the signal switched off."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out Lightning's hints about things that are as they are on purpose."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in (
            ".*You passed in a `val_dataloader` but have no.*",
            ".*does not have many workers.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*You defined a `validation_step` but have no.*",
            ".*`training_step` and you have not.*",
            ".*GPU available but not used.*",
            ".*LeafSpec.*",
            ".*lr_scheduler.step.*",
            ".*module\\(s\\) in eval mode.*",
            ".*Total length of .* across ranks is zero.*",
        ):
            warnings.filterwarnings("ignore", text)
        try:
            yield
        finally:
            logger.setLevel(level)
