"""What the purified-label loss and the reweighted loss cost against plain cross-entropy, and of a training step.

First table: forward + backward on logits, the three losses in turn; images with ignored pixels and images of a single
class are among them. Second table: the same on the logits of a U-Net, by the whole step that made them (forward, loss,
backward, optimiser). Goal: at most 1.2 times cross-entropy. Times on the CPU are processor times, which other programs
disturb less; run it with one thread.

    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/purified.py [--encoder smp:resnet34] [--rounds 25]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from tissuehint.labels import IGNORE
from tissuehint.nn.config import EncoderConfig, NetworkConfig
from tissuehint.nn.networks import build_network
from tissuehint.nn.optimization import Optimization, build_optimizer
from tissuehint.segmentation.losses import LOSSES

GOAL = 1.2
BATCH, SIDE = 8, 224
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def blobs(classes: int) -> Tensor:
    """Targets (8,224,224) in blocks of 32 px: the first image is of one class, a band of the others is ignored."""
    coarse = torch.randint(classes, (BATCH, SIDE // 32, SIDE // 32))
    target = coarse.repeat_interleave(32, 1).repeat_interleave(32, 2)
    target[0] = 0
    target[1:, :20] = IGNORE
    return target.to(DEVICE)


def seconds(work: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def loss_times(logits: Tensor, target: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward + backward of each loss, one after the other in every round."""
    logits = logits.detach().requires_grad_()
    times: dict[str, list[float]] = {name: [] for name in LOSSES}

    def run(name: str) -> None:
        torch.autograd.backward(LOSSES[name](logits, target))

    for index in range(rounds + 3):
        for name, taken in times.items():
            logits.grad = None
            spent = seconds(lambda name=name: run(name))  # type: ignore[misc]
            if index >= 3:
                taken.append(spent)
    return times


def against_cross_entropy(classes: int, rounds: int) -> None:
    times = loss_times(torch.randn(BATCH, classes, SIDE, SIDE, device=DEVICE), blobs(classes), rounds)
    shape = f"({BATCH},{classes},{SIDE},{SIDE})"
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["cross_entropy"], strict=True))
        print(f"{shape:15} {name:14} {1e3 * statistics.median(taken):8.2f} {ratio:6.2f}")


def share_of_step(encoder: str, classes: int, rounds: int) -> None:
    network = build_network(NetworkConfig(encoder=EncoderConfig(name=encoder)), classes).to(DEVICE).train()
    optimizer = build_optimizer(Optimization(), network, 1000)["optimizer"]
    images, target = torch.rand(BATCH, 3, SIDE, SIDE, device=DEVICE), blobs(classes)

    def step(name: str) -> None:
        torch.autograd.backward(LOSSES[name](network(images), target))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    shares: dict[str, list[float]] = {name: [] for name in LOSSES}
    steps: dict[str, list[float]] = {name: [] for name in LOSSES}
    for index in range(rounds + 1):
        with torch.no_grad():
            logits = network(images)
        alone = loss_times(logits, target, 3)
        for name in LOSSES:
            spent = seconds(lambda name=name: step(name))  # type: ignore[misc]
            if index:
                steps[name].append(spent)
                shares[name].append(statistics.median(alone[name]) / spent)
    for name in LOSSES:
        print(f"{name:14} {1e3 * statistics.median(steps[name]):8.0f} {statistics.median(shares[name]):8.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="smp:resnet34")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}; forward + backward of a loss")
    print(f"{'logits':15} {'loss':14} {'ms':>8} {'ratio':>6}   goal <= {GOAL}")
    for classes in (2, 4):
        against_cross_entropy(classes, arguments.rounds)
    if arguments.steps:
        print(f"training step of a U-Net on {arguments.encoder}, ({BATCH},2,{SIDE},{SIDE})")
        print(f"{'loss':14} {'step, ms':>8} {'share':>8}")
        share_of_step(arguments.encoder, 2, arguments.steps)


if __name__ == "__main__":
    main()
