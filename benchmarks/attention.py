"""What attention and pyramid pooling cost: criss-cross against full attention, and their shares of a training step.

First table: forward + backward of one attention on maps of growing side, and its memory: on CUDA the peak above what
was there before, on the CPU what is kept for the backward pass, weights and input left out. ``plain`` is matmul,
softmax, matmul over all pairs of cells, left out (nan) where that does not fit in memory. Exponents say how cost grows
with the side: 3 is HW (H + W), 4 is (HW)^2.

Second table: the gland classifier on 28 x 28 cells. Shares of attention: (step with - step without) / step with, of
whole steps made in turn (forward, loss, backward, optimiser), and the same of the counted operations of the forward
pass. Share of pooling: its forward + backward less that of the plain mean, on class maps alone, by the step.

Times on the CPU are processor times, which other programs disturb less; run it with one thread.

    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/attention.py [--sides ...] [--encoders ...]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from tissuehint.nn.attention import CrissCrossAttention, PositionAttention
from tissuehint.nn.class_maps import ClassMapNetwork, ClassMapSettings
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.optimization import Optimization, build_optimizer
from tissuehint.nn.pyramid_pooling import PyramidFusionPooling
from tissuehint.nn.stage_attention import AttentionName

GOALS = "goals: criss-cross under full attention from 28 x 28 on; attention < 0.10 and pooling < 0.02 of a step"
SIDE, CELLS, CLASSES = 224, 28, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# resnet38d as in the paper; all its levels from the third on have stride 8
LEVELS = {"resnet38d": (-4, -3, -2)}
ATTENTIONS: tuple[AttentionName, ...] = ("criss_cross", "consistency_correlation")


class PlainAttention(PositionAttention):
    """Full attention written out: the matrix of all pairs of cells stands in memory."""

    def forward(self, features: Tensor) -> Tensor:
        """(B,C,H,W) to (B,C,H,W)."""
        query, key, value = (part(features).flatten(2) for part in (self.query, self.key, self.value))
        weights = (query.transpose(1, 2) @ key).softmax(-1)
        attended: Tensor = self.gamma * (value @ weights.transpose(1, 2)).view_as(features) + features
        return attended


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


def gradients(module: nn.Module, features: Tensor) -> None:
    torch.autograd.backward(module(features).sum())


def memory(module: nn.Module, features: Tensor) -> int:
    """Bytes of one forward + backward pass."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(module, features)
        return torch.cuda.max_memory_allocated() - before
    given = {each.untyped_storage().data_ptr() for each in (features, *module.parameters())}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        gradients(module, features)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in given)


def fits(side: int) -> bool:
    """Whether the matrix of all pairs of cells does, about five times over, in half of the free memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 5 * 4 * side**4 < (torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else free) / 2


def compare_attentions(sides: Sequence[int], channels: int, rounds: int) -> None:
    kinds = {"plain": PlainAttention, "position": PositionAttention, "criss-cross": CrissCrossAttention}
    modules = {name: kind(channels).to(DEVICE) for name, kind in kinds.items()}
    print(f"one attention, {channels} channels, batch 1; ratios to plain, exponents from one side to the next")
    print(
        f"{'side':>4}  {'attention':12} {'ms':>9} {'ratio':>6} {'exponent':>8} {'MiB':>9} {'ratio':>6} {'exponent':>8}"
    )
    before: dict[str, tuple[int, float, float]] = {}
    for side in sides:
        run = modules if fits(side) else {"criss-cross": modules["criss-cross"]}
        features = torch.randn(1, channels, side, side, device=DEVICE, requires_grad=True)
        turns = [
            {name: seconds(lambda m=module, f=features: gradients(m, f)) for name, module in run.items()}  # type: ignore[misc]
            for _ in range(rounds + 1)
        ][1:]
        sizes = {name: memory(module, features) for name, module in run.items()}
        for name, size in sizes.items():
            now = side, statistics.median(turn[name] for turn in turns), size
            faster = statistics.median(turn[name] / turn.get("plain", math.nan) for turn in turns)
            smaller = size / sizes.get("plain", math.nan)
            was = before.get(name, (1, math.nan, math.nan))
            grows = [math.log(now[i] / was[i]) / math.log(side / was[0]) for i in (1, 2)]
            print(
                f"{side:4}  {name:12} {1e3 * now[1]:9.2f} {faster:6.3f} {grows[0]:8.2f} "
                f"{size / 2**20:9.2f} {smaller:6.3f} {grows[1]:8.2f}"
            )
            before[name] = now


def training_step(name: str, attention: AttentionName, images: Tensor, tags: Tensor) -> tuple[Callable[[], None], int]:
    """One step of the gland classifier, and the operations of its forward pass."""
    torch.manual_seed(0)
    settings = ClassMapSettings(
        encoder=EncoderConfig(name=name, output_stride=None if name == "resnet38d" else 8),
        attention=attention,
        attention_levels=LEVELS.get(name, (-3, -2, -1)),
        pooling="pyramid_fusion",
    )
    network = ClassMapNetwork(settings, CLASSES).to(DEVICE).train()
    optimizer = build_optimizer(Optimization(), network, 1000)["optimizer"]

    def step() -> None:
        torch.autograd.backward(F.binary_cross_entropy_with_logits(network(images).logits, tags))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # only forward: torch counts the backward pass of a grouped convolution as if it had one group
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    return step, counter.get_total_flops()


def shares(name: str, attention: AttentionName, batch: int, rounds: int) -> None:
    images = torch.rand(batch, 3, SIDE, SIDE, device=DEVICE)
    tags = torch.randint(0, 2, (batch, CLASSES), device=DEVICE).float()
    maps = torch.randn(batch, CLASSES, CELLS, CELLS, device=DEVICE, requires_grad=True)
    pooling = PyramidFusionPooling(CLASSES).to(DEVICE)
    bare, fewer = training_step(name, "none", images, tags)
    attended, more = training_step(name, attention, images, tags)
    turns = []
    for _ in range(rounds + 1):
        without, step = seconds(bare), seconds(attended)
        fused = seconds(lambda: torch.autograd.backward(pooling(maps)[0].sum()))
        mean = seconds(lambda: torch.autograd.backward(maps.mean((2, 3)).sum()))
        turns.append((1e3 * step, (step - without) / step, (fused - mean) / step))
    step, share, pooled = (statistics.median(each) for each in zip(*turns[1:], strict=True))
    print(f"{name:18} {attention:24} {step:8.0f} {share:6.3f} {(more - fewer) / more:10.3f} {pooled:8.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="*", default=[14, 28, 56, 112, 168])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--encoders", nargs="*", default=["mobilenetv2_100", "resnet50", "resnet38d"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}\n{GOALS}")
    if arguments.sides:
        compare_attentions(arguments.sides, arguments.channels, arguments.rounds)
    if arguments.encoders:
        print(f"training step at {SIDE} px, batch {arguments.batch_size}: shares of attention and of pooling")
        print(f"{'encoder':18} {'attention':24} {'step, ms':>8} {'share':>6} {'operations':>10} {'pooling':>8}")
    for name in arguments.encoders:
        for attention in ATTENTIONS:
            shares(name, attention, arguments.batch_size, arguments.rounds)


if __name__ == "__main__":
    main()
