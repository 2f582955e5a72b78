"""What a training step of ``cam`` costs against the bare network, and whether the loader keeps up.

In one run, step by step in turn: the step that the trainer makes (forward, loss, backward, optimiser, logging) and
forward + backward of the same encoder and head on the same batch. Goals: ratio at most 1.15; data wait under 5 % of the
step.

    uv run python benchmarks/cam_step.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from tissuehint.data.module import DataConfig, PhantomConfig, TissueData, load_dataset
from tissuehint.methods.cam import CAM, CAMConfig
from tissuehint.nn.config import EncoderConfig
from tissuehint.pipeline.training import SeedEachStep

STEP_GOAL = 1.15
WAIT_GOAL = 0.05


class InTurn(Callback):
    """Times each step of the trainer, then the bare network on the same batch."""

    def __init__(self, bare: torch.nn.Module, warmup: int) -> None:
        self.bare = bare
        self.warmup = warmup
        self.steps: list[float] = []
        self.bares: list[float] = []
        self.waits: list[float] = []
        self.since = 0.0
        self.started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """The batch is there."""
        self.started = time.perf_counter()
        if index > self.warmup:
            self.waits.append(self.started - self.since)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The step is done; now the bare network."""
        _wait(batch.images)
        done = time.perf_counter()
        maps = self.bare.classifier(self.bare.encoder(batch.images)[-1])
        F.binary_cross_entropy_with_logits(maps.mean((2, 3)), batch.tags).backward()
        self.bare.zero_grad(set_to_none=True)
        _wait(batch.images)
        if index >= self.warmup:
            self.steps.append(done - self.started)
            self.bares.append(time.perf_counter() - done)
        self.since = time.perf_counter()


class WaitOnly(Callback):
    """Times how long plain training waits for its batches."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.since = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        """The batch is there."""
        now = time.perf_counter()
        if index > self.warmup:
            self.waits.append(now - self.since)
        self.since = now

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """The step is done."""
        _wait(batch.images)
        now = time.perf_counter()
        if index > self.warmup:
            self.steps.append(now - self.since)
        self.since = now


def _wait(images: torch.Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize()


def _trainer(callback: Callback, steps: int) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[SeedEachStep(0), callback],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="mobilenetv2_100")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    steps, warmup = arguments.steps, 4
    config = DataConfig(source="phantom", workers=arguments.workers, phantom=PhantomConfig(train=32, val=0, test=1))
    dataset = load_dataset(config)

    def fit(callback: Callback) -> L.LightningModule:
        data = TissueData(dataset, config)
        data.train_on(data.hints("train", "tags"), batch_size=arguments.batch_size, round_steps=steps)
        method = CAM(CAMConfig(encoder=EncoderConfig(name=arguments.encoder)), dataset.labels)
        _trainer(callback, steps).fit(method, datamodule=data)
        return method

    bare = CAM(CAMConfig(encoder=EncoderConfig(name=arguments.encoder)), dataset.labels).network
    bare.to("cuda" if torch.cuda.is_available() else "cpu").train()
    turns = InTurn(bare, warmup)
    fit(turns)
    plain = WaitOnly(warmup)
    fit(plain)
    ratio = statistics.median(step / one for step, one in zip(turns.steps, turns.bares, strict=True))
    wait = sum(plain.waits) / (sum(plain.waits) + sum(plain.steps))
    print(f"{arguments.encoder}, 224 px, batch {arguments.batch_size}, {torch.get_num_threads()} threads")
    print(f"cam step / bare forward+backward   {ratio:6.3f}   goal <= {STEP_GOAL}")
    print(f"data wait / step                   {wait:6.3f}   goal <  {WAIT_GOAL}")
    print(f"(bare {1e3 * statistics.median(turns.bares):.0f} ms, step {1e3 * statistics.median(turns.steps):.0f} ms)")


if __name__ == "__main__":
    main()
