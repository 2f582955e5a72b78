"""VSLP's fusion, exact solver and transport, each against a reference; on the CPU or the GPU at hand.

    OMP_NUM_THREADS=2 uv run python benchmarks/vslp.py
    uv run python benchmarks/vslp.py --images 16    # as a batch

Prints Markdown. Times are the least of some repetitions; ratios are within this run.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.labels import LabelSpace
from tissuehint.methods.vslp import VSLP, VSLPConfig
from tissuehint.methods.vslp.energy import average
from tissuehint.methods.vslp.views import Seen
from tissuehint.ops.sinkhorn import transport
from tissuehint.ops.variational_multiclass import _Problem, segment_multiclass

VIEWS, CLASSES, SIDE = 12, 3, 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--part", choices=("all", "fusion", "exact", "transport", "memory"), default="all")
    parser.add_argument("--images", type=int, default=1, help="fused at once; seconds are of all of them")
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side is not None:
        one_flow(options.side)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}\n")
    if options.part in ("all", "fusion"):
        fusion(device, options.repeat, options.images)
    if options.part in ("all", "exact"):
        exact(device, options.repeat)
    if options.part in ("all", "transport"):
        transports(device, options.repeat)
    if options.part in ("all", "memory"):
        memory()


def fusion(device: torch.device, repeat: int, count: int) -> None:
    """Minimising the energy of images of 224 px with 12 views, by the time of one view's forward pass."""
    encoder = {"name": "swin_tiny_patch4_window7_224"}
    name = encoder["name"]
    what = f"{VIEWS} views of each of {count} images of {SIDE} px"
    print(f"Fusing {what}, {CLASSES} classes, 10 steps; a forward pass of {name}:\n")
    print("| energy | working grid | s | by one forward pass | by the forward passes of all views |")
    print("|---|---|---|---|---|")
    wide = {"features": 32, "macro_blocks": 3}
    rows: dict[str, tuple[dict[str, Any], int]] = {
        "learned, 16 features, 1 block (default)": ({}, 4),
        "learned, 32 features, 3 blocks (Kobler et al.)": ({"regulariser": wide}, 4),
        "learned, 16 features, 1 block": ({}, 1),
        "total variation, flow": ({"regulariser": {"name": "total_variation"}}, 4),
        "total variation, primal-dual": (
            {"fidelity": "linear", "solver": "primal_dual", "regulariser": {"name": "total_variation"}},
            4,
        ),
        "total variation, ground cost by transport": (
            {"ground_cost": [[0, 1, 2], [1, 0, 1], [2, 1, 0]], "regulariser": {"name": "total_variation"}},
            4,
        ),
    }
    forward = None
    for name, (settings, resolution) in rows.items():
        method = build(encoder, settings, resolution).to(device)
        images, seen = problem(device, method.grid(torch.zeros(1, 3, SIDE, SIDE)), count=count)
        if forward is None:
            forward = least(partial(method.network, images), repeat, device)
        energy, start = method.energy(images, seen), average(seen, "log")
        fusion_config = method.config.fusion
        assert fusion_config is not None
        if fusion_config.solver == "flow":
            seconds = least(partial(method._flow, energy, start, None), repeat, device)
        else:
            seconds = least(partial(method._exact, energy, None, near_hard=False), repeat, device)
        grid = f"{start.shape[-2]} x {start.shape[-1]}"
        print(f"| {name} | {grid} | {seconds:.3f} | {seconds / forward:.1f} | {seconds / forward / VIEWS:.2f} |")
    print()


def exact(device: torch.device, repeat: int) -> None:
    """The exact solver: its kernel on the CPU, or its graph on the GPU, against the same steps called one by one."""
    print("Exact segmentation with given areas, by the same steps with torch's operators called one by one:\n")
    print("| maps | s | iterations | operators, s | ratio |")
    print("|---|---|---|---|---|")
    for shape in ((4, 3, 56, 56), (32, 2, 14, 14), (1, 3, 224, 224)):
        torch.manual_seed(0)
        smooth = F.interpolate(torch.rand(*shape[:2], 5, 5), shape[2:], mode="bicubic")
        cost = (torch.rand(shape) + smooth).to(device)
        wanted = torch.randn(shape[:2]).softmax(1).to(device)
        solve = partial(segment_multiclass, cost, smoothness=0.5, proportions=wanted, strength=100.0)
        ours = least(solve, repeat, device)
        with patch.object(_Problem, "_solver", _Problem._one_by_one):
            operators = least(solve, repeat, device)
        print(f"| {shape} | {ours:.3f} | {solve().iterations} | {operators:.3f} | {ours / operators:.2f} |")
    print()


def transports(device: torch.device, repeat: int) -> None:
    """Transport between the views of all pixels and a map, against POT's batched solver."""
    count = VIEWS * (SIDE // 4) ** 2
    print(f"{count} problems, epsilon .05 of the largest cost; marginal error: largest of any row or column:\n")
    heads = ["classes", "ours, s", "marginal error", "POT 50 iterations, s", "marginal error", "ours / POT"]
    print(f"| {' | '.join([*heads, 'POT 1000 iterations, s', 'marginal error'])} |")
    print("|---|---|---|---|---|---|---|---|")
    for classes in (3, 4, 6):
        torch.manual_seed(0)
        drawn = torch.distributions.Dirichlet(torch.ones(classes))
        a, b = drawn.sample((count,)).to(device), drawn.sample((count,)).to(device)
        cost = 1 - torch.eye(classes, device=device)
        costs = cost.expand(count, classes, classes)

        pot = partial(pot_plan, costs, a, b)
        ours = least(partial(transport, a, b, cost), repeat, device)
        short = least(partial(pot, 50), repeat, device)
        long = least(partial(pot, 1000), 1, device)
        errors = [marginal_error(plan, a, b) for plan in (transport(a, b, cost).plan, pot(50), pot(1000))]
        print(
            f"| {classes} | {ours:.2f} | {errors[0]:.1e} | {short:.2f} | {errors[1]:.1e} | {ours / short:.2f} "
            f"| {long:.1f} | {errors[2]:.1e} |"
        )
    print()


def pot_plan(costs: Tensor, a: Tensor, b: Tensor, iterations: int) -> Tensor:
    import ot.batch

    found = ot.batch.solve_batch(costs, 0.05, a, b, iterations, method="log_sinkhorn", grad="detach")
    plan: Tensor = found.plan
    return plan


def memory() -> None:
    """Peak memory of the fusion by the pixels of the working grid, each size in a process of its own."""
    print(
        "Peak memory of the flow by the working grid (12 views in single precision, 3 classes, learned regulariser):\n"
    )
    print("| grid | MB above the problem itself | kB a pixel |")
    print("|---|---|---|")
    for side in (128, 256, 512, 768):
        found = subprocess.run(
            [sys.executable, __file__, "--side", str(side)], capture_output=True, check=True, text=True
        )
        used = int(found.stdout.split()[-1])
        print(f"| {side} x {side} | {used / 1e6:.0f} | {used / side**2 / 1e3:.2f} |")


def one_flow(side: int) -> None:
    """Bytes that a flow on a grid takes at most, beyond what was there before."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = build({"name": "test_resnet"}, {}, 1).to(device)
    # everything that is loaded lazily is loaded by a small one
    for size in (32, side):
        images, seen = problem(device, (size, size), size)
        energy, start = method.energy(images, seen), average(seen, "log")
        before = peak(device, reset=True)
        with torch.no_grad():
            method._flow(energy, start, None)
        used = peak(device) - before
    print(used)


def build(encoder: dict[str, Any], fusion_settings: dict[str, Any], resolution: int) -> VSLP:
    torch.manual_seed(0)
    config = VSLPConfig(confidence={"encoder": encoder}, fusion=fusion_settings, resolution=resolution)
    return VSLP(config, LabelSpace(("tumour", "stroma", "normal"))).eval()


def problem(device: torch.device, grid: tuple[int, int], side: int = SIDE, count: int = 1) -> tuple[Tensor, Seen]:
    """Images and what 12 views say of them: smooth maps and noise."""
    torch.manual_seed(0)
    images = torch.rand(count, 3, side, side, device=device)
    smooth = F.interpolate(torch.randn(count, CLASSES, 7, 7), grid, mode="bicubic")
    noise = F.interpolate(torch.randn(count * VIEWS, CLASSES, 14, 14), grid, mode="bilinear")
    views = (smooth[:, None] + noise.view(count, VIEWS, CLASSES, *grid)).softmax(2)
    return images, Seen(views.to(device), torch.ones(count, VIEWS, *grid, device=device))


def marginal_error(plan: Tensor, a: Tensor, b: Tensor) -> float:
    return max(float((plan.sum(2) - a).abs().max()), float((plan.sum(1) - b).abs().max()))


def least(work: Callable[[], Any], repeat: int, device: torch.device) -> float:
    """Seconds of the fastest of some calls, after one to warm up where there are several."""
    times = []
    with torch.no_grad():
        for _ in range(repeat + (repeat > 1)):
            begun = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    return min(times)


def peak(device: torch.device, *, reset: bool = False) -> int:
    """Bytes; on the CPU the highest resident set so far, so sizes must rise."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


if __name__ == "__main__":
    main()
