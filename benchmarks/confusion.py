"""Cost of the metrics, as ratios to the prediction that they score, in one run.

Usage:
    python benchmarks/confusion.py [--threads 1]

Scores a batch of 8 patches of 224 px with 4 classes. The prediction is the forward pass of a U-Net on
mobilenetv2_100 in inference mode on the CPU. Exits with code 1 where the confusion matrix costs more than 2 % of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from tissuehint.metrics import boundary_counts, confusion_matrix

BATCH, SIDE, CLASSES = 8, 224, 4
LIMIT = 0.02


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    generator = np.random.default_rng(0)
    blocks = generator.integers(0, CLASSES, (BATCH, SIDE // 16, SIDE // 16), dtype=np.uint8)
    target = blocks.repeat(16, axis=1).repeat(16, axis=2)
    prediction = np.roll(target, (3, -2), (1, 2))
    bytes_pair = torch.from_numpy(prediction), torch.from_numpy(target)
    long_pair = bytes_pair[0].long(), bytes_pair[1].long()
    holes = target.copy()
    holes[:, :40] = 255
    network = smp.Unet(encoder_name="tu-mobilenetv2_100", encoder_weights=None, classes=CLASSES).eval()
    images = torch.rand(BATCH, 3, SIDE, SIDE)

    def forward() -> object:
        with torch.inference_mode():
            return network(images)

    reference = median_seconds(forward, arguments.repeats)
    torchmetrics_time = median_seconds(lambda: multiclass_confusion_matrix(*long_pair, CLASSES), arguments.repeats)
    calls: dict[str, Callable[[], object]] = {
        "confusion_matrix, NumPy uint8": lambda: confusion_matrix(prediction, target, CLASSES),
        "confusion_matrix, NumPy uint8, 18 % ignored": lambda: confusion_matrix(prediction, holes, CLASSES),
        "confusion_matrix, torch uint8": lambda: confusion_matrix(*bytes_pair, CLASSES),
        "confusion_matrix, torch int64": lambda: confusion_matrix(*long_pair, CLASSES),
        "boundary_counts, d = 6": lambda: boundary_counts(prediction, target, CLASSES),
    }
    print(f"{BATCH} x {SIDE} x {SIDE} px, {CLASSES} classes, torch {torch.__version__}, {arguments.threads} threads")
    print(f"{'':46}{'ms':>9}{'/ torchmetrics':>16}{'/ prediction':>14}")
    within = True
    rows = {"prediction": reference, "torchmetrics confusion matrix, torch int64": torchmetrics_time}
    rows |= {name: median_seconds(call, arguments.repeats) for name, call in calls.items()}
    for name, seconds in rows.items():
        share = seconds / reference
        print(f"{name:46}{1e3 * seconds:9.2f}{seconds / torchmetrics_time:16.3f}{100 * share:12.2f} %")
        within &= share < LIMIT or not name.startswith("confusion_matrix")
    print(f"confusion_matrix below {100 * LIMIT:.0f} % of the prediction: {'yes' if within else 'NO'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
