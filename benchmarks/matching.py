"""What foreground/background matching costs beside its frozen encoder, and what chunks of pairs save in memory.

First table: the most memory that forward + backward of ``masked_image_losses`` takes above what the process has in use
before its maps are made: in chunks, and ``plain``, all pictures at once and differentiated by torch alone. Every number
is of a process of its own; ``plain`` is left out (nan) where, by the last one, it would not fit in half of the free
memory. Last row: growth per pair from the first to the last; weights and their gradients are 4 h w numbers a pair. Read
from /proc, so on Linux only.

Second table: the matching part of a training step (maps of 14 x 14 enlarged, weighted, cut out, encoded, contrasted,
and back to the maps) by forward + backward of the bare encoder on as many pictures, in batches as large, and all at
once. Shares: forward + backward of the parts by themselves, by the matching part. Least of several rounds, all in turn
in every round.

Times are processor times, which other programs disturb less; run it with one thread.

    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/matching.py [--encoders ...] [--pairs ...]
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.nn.masked_images import masked_image_losses
from tissuehint.nn.matching import Pairs, adaptive_weights, matching_losses, prototype_pairs

SIDE, CELLS, CLASSES, EACH, THRESHOLD = 224, 14, 4, 3, 0.15
MIB = 2**20


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0).eval().requires_grad_(False)


def scene(encoder: nn.Module, pairs: int) -> tuple[Tensor, Pairs, Tensor]:
    """Images with two tagged classes each, their pairs, and prototypes."""
    images = torch.randn(math.ceil(pairs / 2), 3, SIDE, SIDE)
    number = torch.arange(pairs)
    prototypes = torch.randn(CLASSES, EACH, encoder(images[:1]).shape[1])
    return images, Pairs(number // 2, number % CLASSES, None), prototypes


def plainly(
    foreground: Tensor, background: Tensor, images: Tensor, pairs: Pairs, prototypes: Tensor, encode: nn.Module
):  # type: ignore[no-untyped-def]
    pictures = torch.cat([each[:, None] * images[pairs.images] for each in (foreground, background)])
    front, back = encode(pictures).chunk(2)
    return matching_losses(front, back, prototypes, pairs.classes)


def in_use(kind: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def measure_memory(name: str, pairs: int, chunk: int) -> float:
    """MiB of forward + backward; in a process that has done nothing else. Chunk 0 is without chunks."""
    encoder = build(name)
    images, places, prototypes = scene(encoder, pairs)
    before = in_use("VmRSS")
    front, back = (torch.rand(pairs, SIDE, SIDE, requires_grad=True) for _ in range(2))
    if chunk:
        losses = masked_image_losses(front, back, images, places, prototypes, encoder, chunk=chunk)
    else:
        losses = plainly(front, back, images, places, prototypes, encoder)
    torch.autograd.backward(losses[0] + losses[1])
    return in_use("VmHWM") - before


def in_another_process(name: str, pairs: int, chunk: int) -> float:
    command = [sys.executable, __file__, "--measure", name, str(pairs), str(chunk)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare_memory(name: str, numbers: Sequence[int], chunk: int) -> None:
    print(f"memory of forward + backward, {name}, {SIDE} px, MiB; chunks of {chunk} pairs")
    print(f"{'pairs':>5} {'chunks':>9} {'plain':>9} {'ratio':>6}")
    rows: list[tuple[int, float, float]] = []
    for pairs in numbers:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / MIB
        fits = not rows or rows[-1][2] * pairs / rows[-1][0] < free / 2
        plain = in_another_process(name, pairs, 0) if fits else math.nan
        rows.append((pairs, in_another_process(name, pairs, chunk), plain))
        print(f"{pairs:5} {rows[-1][1]:9.0f} {plain:9.0f} {rows[-1][1] / plain:6.3f}", flush=True)
    if len(rows) > 1:
        chunks, plain = (growth([(row[0], row[column]) for row in rows]) for column in (1, 2))
        print(f"a pair {chunks:8.2f} {plain:9.2f}; 4 h w numbers: {16 * SIDE**2 / MIB:.2f}")


def growth(points: Sequence[tuple[int, float]]) -> float:
    known = [point for point in points if not math.isnan(point[1])]
    (first, low), (last, high) = known[0], known[-1]
    return (high - low) / (last - first) if last > first else math.nan


def works(name: str, pairs: int, chunk: int) -> dict[str, Callable[[], None]]:
    """The whole of matching, the bare encoder, and the other parts by themselves."""
    encoder = build(name)
    images, places, prototypes = scene(encoder, pairs)
    small = torch.randn(pairs, CELLS, CELLS, requires_grad=True)
    large = torch.randn(pairs, SIDE, SIDE, requires_grad=True)
    features = [torch.randn(pairs, prototypes.shape[2], requires_grad=True) for _ in range(2)]
    pictures = torch.cat([weights[:, None] * images[places.images] for weights in adaptive_weights(large, THRESHOLD)])
    pictures = pictures.detach()
    tags, scores = torch.randint(0, 2, (len(images), CLASSES)), torch.randn(len(images), CLASSES * EACH)

    def matching() -> None:
        maps = F.interpolate(small[:, None], (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]
        weights = adaptive_weights(maps, THRESHOLD)
        losses = masked_image_losses(*weights, images, places, prototypes, encoder, chunk=chunk)
        torch.autograd.backward(losses[0] + losses[1])

    def bare(size: int) -> None:
        for batch in pictures.split(size):
            torch.autograd.backward(encoder(batch.requires_grad_()).sum())

    def losses_alone() -> None:
        losses = matching_losses(*features, prototypes, places.classes)
        torch.autograd.backward(losses[0] + losses[1])

    def weights_alone() -> None:
        front, back = adaptive_weights(large, THRESHOLD)
        torch.autograd.backward(front.sum() + back.sum())

    return {
        "matching": matching,
        "bare": lambda: bare(2 * chunk),
        "at once": lambda: bare(2 * pairs),
        "losses": losses_alone,
        "weights": weights_alone,
        "pairs": lambda: prototype_pairs(tags, scores, [EACH] * CLASSES) and None,
    }


def seconds(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def compare_times(name: str, pairs: int, chunk: int, rounds: int) -> None:
    run = works(name, pairs, chunk)
    turns = [{part: seconds(work) for part, work in run.items()} for _ in range(rounds + 1)][1:]
    least = {part: min(turn[part] for turn in turns) for part in run}
    whole = least["matching"]
    shares = " ".join(f"{least[part] / whole:8.5f}" for part in ("losses", "weights", "pairs"))
    ratios = f"{whole / least['bare']:6.3f} {whole / least['at once']:7.3f}"
    print(f"{name:16} {pairs:5} {chunk:5} {whole:8.2f} {ratios} {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="*", default=["mobilenetv2_100", "resnet18"])
    parser.add_argument("--pairs", type=int, nargs="*", default=[16, 32, 64, 128], help="of the memory table")
    parser.add_argument("--timed-pairs", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=16, help="of the memory table")
    parser.add_argument("--timed-chunks", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=3, metavar=("ENCODER", "PAIRS", "CHUNK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, pairs, chunk = arguments.measure
        print(measure_memory(name, int(pairs), int(chunk)))
        return
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads")
    for name in arguments.encoders:
        if arguments.pairs:
            compare_memory(name, arguments.pairs, arguments.chunk)
    if arguments.timed_chunks:
        print(f"matching part of a step, {SIDE} px, by the bare encoder; shares of its other parts")
        header = f"{'encoder':16} {'pairs':>5} {'chunk':>5} {'s':>8} {'ratio':>6} {'at once':>7}"
        print(f"{header} {'losses':>8} {'weights':>8} {'pairs':>8}")
    for name in arguments.encoders:
        for chunk in arguments.timed_chunks:
            compare_times(name, arguments.timed_pairs, chunk, arguments.rounds)


if __name__ == "__main__":
    main()
