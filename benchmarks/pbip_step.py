"""Time of a training step of pbip over the sum of its parts: the bare classifier's step, and the frozen encoder's work.

    OMP_NUM_THREADS=1 uv run python benchmarks/pbip_step.py

The parts are measured in the same process, alternating, as processor time; the least of several repeats counts.
``bare`` is the step with the classification loss alone; ``frozen`` is forward and backward of the frozen encoder on as
many random pictures as the pairs of image and class need (two each), in the same chunks and memory order. Goal: at most
1.25.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch

from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.methods.pbip import PBIP, PBIPConfig
from tissuehint.nn.image_encoders import RandomEncoderWarning
from tissuehint.nn.matching import class_pairs, prototype_pairs

CASES = {
    "mobilenetv2_100, 112 px, 2 classes": ("mobilenetv2_100", 112, 2, 16),
    "mobilenetv2_100, 224 px, 4 classes": ("mobilenetv2_100", 224, 4, 8),
    "resnet50, 224 px, 4 classes": ("resnet50", 224, 4, 4),
}


def least(step: Callable[[], None], others: list[Callable[[], None]], repeats: int) -> list[float]:
    """Processor seconds of ``step`` and ``others``, each the least of ``repeats`` alternating measurements."""
    every = [step, *others]
    best = [float("inf")] * len(every)
    for turn in range(repeats + 1):
        for number, each in enumerate(every):
            start = time.process_time()
            each()
            if turn:  # the first turn fills caches
                best[number] = min(best[number], time.process_time() - start)
    return best


def measure(name: str, side: int, classes: int, batch_size: int, form: str, repeats: int) -> None:
    """Print one line."""
    torch.manual_seed(0)
    labels = LabelSpace(tuple(f"tissue {number}" for number in range(classes)))
    settings = {
        "encoder": {"name": name, "output_stride": 16},
        "image_encoder": {"name": name, "side": side},
        "matching": {"form": form},
    }
    full = PBIP(PBIPConfig(name="pbip", **settings), labels).train()
    bare = PBIP(PBIPConfig(name="pbip", **{**settings, "matching": {"weight": 0}}), labels).train()
    for method in (full, bare):
        method.to(memory_format=torch.channels_last)
        method.bank_prototypes.copy_(torch.randn_like(method.bank_prototypes))
    tags = (torch.rand(batch_size, classes) < 0.5).float()
    tags[:, 0] = 1
    batch = Batch([str(n) for n in range(batch_size)], torch.rand(batch_size, 3, side, side), tags=tags)
    encoder = full.image_encoder
    with torch.no_grad():
        seen = full.see(batch.images)
    pairs = class_pairs(tags) if form == "class" else prototype_pairs(tags, seen.logits[-1], full.counts)
    count, chunk = len(pairs.classes), full.config.matching.chunk

    def step(method: PBIP) -> None:
        method.zero_grad(set_to_none=True)
        torch.stack(list(method.losses(batch).values())).sum().backward()

    def frozen() -> None:
        for start in range(0, count, chunk):
            pictures = torch.randn(2 * min(chunk, count - start), 3, side, side)
            pictures = pictures.contiguous(memory_format=torch.channels_last).requires_grad_()
            features = encoder.encode(pictures)
            torch.autograd.grad(features.sum(), pictures)

    whole, alone, work = least(lambda: step(full), [lambda: step(bare), frozen], repeats)
    print(
        f"{name:16s} {side:4d} px  {classes} classes  {form:9s} {count:3d} pairs  step {whole * 1e3:7.0f} ms  "
        f"bare {alone * 1e3:7.0f}  frozen {work * 1e3:7.0f}  ratio {whole / (alone + work):.3f}",
        flush=True,
    )


def main() -> None:
    """Print a line for each case and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    warnings.simplefilter("ignore", RandomEncoderWarning)
    torch.set_num_threads(1)
    for name, side, classes, batch_size in CASES.values():
        for form in ("class", "prototype"):
            measure(name, side, classes, batch_size, form, repeats)


if __name__ == "__main__":
    main()
