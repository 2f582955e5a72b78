"""Time of the diversity losses of lpd, forward and backward, over a training step and beside the naive triple loop.

    OMP_NUM_THREADS=1 uv run python benchmarks/diversity.py

10 images, 4 classes, 10 prototypes a class, 14 x 14 cells of 512 channels: the setting of the paper. The step is that
of the classification loss alone (``bare``, the harshest measure) and that of lpd with 24 pairs (the paper's has about
100). Processor time, alternating in one process, the least of several repeats. Goal: at most .03 of the step.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.methods.lpd import LPD, LPDConfig, correlation_diversity_loss, jeffreys_diversity_loss
from tissuehint.nn.image_encoders import RandomEncoderWarning

IMAGES, CLASSES, PROTOTYPES, CELLS, CHANNELS = 10, 4, 10, 14, 512


def naive_jeffreys(features: Tensor, prototypes: Tensor, regions: Tensor) -> Tensor:
    """The same loss in loops over images, classes and pairs, as one writes it first."""
    of_images = []
    for image, region in zip(features, regions, strict=True):
        of_classes = []
        for number, own in enumerate(prototypes):
            pixels = image[:, region == number]
            if pixels.shape[1] < 2 * len(own):
                continue
            logs = (F.cosine_similarity(pixels[None], own[:, :, None], dim=1) / 0.1).log_softmax(1)
            alike = []
            for first in range(len(own)):
                for second in range(first + 1, len(own)):
                    difference = logs[first].exp() - logs[second].exp()
                    alike.append(torch.exp(-(difference * (logs[first] - logs[second])).sum()))
            of_classes.append(torch.stack(alike).mean())
        if of_classes:
            of_images.append(torch.stack(of_classes).mean())
    return torch.stack(of_images).mean()


def least(parts: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Processor seconds of each part, the least of alternating measurements."""
    best = dict.fromkeys(parts, math.inf)
    for turn in range(repeats + 1):
        for name, part in parts.items():
            start = time.process_time()
            part()
            if turn:  # the first turn fills caches
                best[name] = min(best[name], time.process_time() - start)
    return best


def step_of(method: LPD, batch: Batch) -> Callable[[], None]:
    """Forward and backward of all losses."""

    def step() -> None:
        method.zero_grad(set_to_none=True)
        torch.stack(list(method.losses(batch).values())).sum().backward()

    return step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="hf:mit_b1")
    parser.add_argument("--image-encoder", default="resnet18")
    parser.add_argument("--repeats", type=int, default=2)
    words = parser.parse_args()
    warnings.simplefilter("ignore", RandomEncoderWarning)
    torch.manual_seed(0)
    labels = LabelSpace(tuple(f"tissue {number}" for number in range(CLASSES)))
    settings = {
        "encoder": {"name": words.encoder, "output_stride": 16},
        "image_encoder": {"name": words.image_encoder, "side": 224},
        "matching": {"max_pairs": 24},
        "diversity": {"weight": 0},
    }
    images = torch.rand(IMAGES, 3, 16 * CELLS, 16 * CELLS)
    tags = (torch.rand(IMAGES, CLASSES) < 0.5).float()
    tags[:, 0] = 1
    batch = Batch([str(number) for number in range(IMAGES)], images, tags=tags)
    steps = {
        name: step_of(LPD(LPDConfig(warm_up=warm_up, **settings), labels).train(), batch)
        for name, warm_up in (("bare step", 1), ("lpd step", 0))
    }
    features = torch.randn(IMAGES, CHANNELS, CELLS, CELLS, requires_grad=True)
    prototypes = torch.randn(CLASSES, PROTOTYPES, CHANNELS, requires_grad=True)
    regions = torch.randint(CLASSES, (IMAGES, CELLS, CELLS))  # all classes in all images: the most work

    def run(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        return lambda: loss(features, prototypes, regions).backward()  # type: ignore[no-untyped-call]

    losses = {"jeffreys": run(jeffreys_diversity_loss), "correlation": run(correlation_diversity_loss)}
    error = abs(
        float(jeffreys_diversity_loss(features, prototypes, regions) - naive_jeffreys(features, prototypes, regions))
    )
    best = least({**steps, **losses, "naive jeffreys": run(naive_jeffreys)}, words.repeats)
    print(f"{words.encoder}, frozen {words.image_encoder}; difference to the naive loss {error:.1e}")
    print(f"{'':16s} {'ms':>9s} {'of bare step':>13s} {'of lpd step':>12s}")
    for name, seconds in best.items():
        shares = (seconds / best["bare step"], seconds / best["lpd step"])
        print(f"{name:16s} {seconds * 1e3:9.1f} {shares[0]:13.3f} {shares[1]:12.4f}")


if __name__ == "__main__":
    main()
