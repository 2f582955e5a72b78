"""Speed, energy and memory of the two-phase solvers against a straightforward operator splitting with sparse LU.

The reference solves one map at a time: in every iteration it assembles both directions of the additive operator
splitting as sparse matrices over the whole map and factorises them (scipy). It is slow, so it runs on a few maps
(``--reference-maps``) and its time per map is what the ratios take. All solvers get the same fixed means, those that
``primal_dual`` finds; energies are means over the maps of the reference. The last row has free means.

    uv run --no-sync python benchmarks/variational.py [--quick]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_matrix, csc_matrix, diags
from scipy.sparse.linalg import splu

from tissuehint.ops import variational_aos as aos
from tissuehint.ops.variational import TwoPhase, edge_weight, segment_two_phase, two_phase_energy
from tissuehint.ops.variational_model import start
from tissuehint.ops.variational_primal_dual import primal_dual_torch

DATA_WEIGHT = 3.0
GOAL = 300
Map = NDArray[np.float64]


def contrast_like(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth blobs with texture noise, squared and scaled to [0, 1] as contrast maps are: (N,H,W) float32."""
    draw = np.random.default_rng(seed)
    maps = []
    for _ in range(count):
        blobs = gaussian_filter(draw.normal(size=(size, size)), size / 12)
        blobs = (blobs - blobs.min()) / np.ptp(blobs)
        texture = gaussian_filter(draw.normal(size=(size, size)), 1.5)
        z = np.clip(1 / (1 + np.exp(-14 * (blobs - 0.55))) + 0.1 * texture / texture.std(), 0, None) ** 2
        maps.append((z - z.min()) / np.ptp(z))
    return torch.from_numpy(np.stack(maps)).float()


def _operator(u: Map, g: Map, axis: int, number: NDArray[np.int64]) -> csc_matrix:
    """The tridiagonal operator of one direction over the whole map, zero row sums at the ends."""
    u, g, number = (np.moveaxis(each, axis, 0) for each in (u, g, number))
    wide = np.pad(u, ((0, 0), (1, 1)), mode="edge")
    across = 0.5 * (wide[:, 2:] - wide[:, :-2])
    turn = 0.5 * (across[1:] + across[:-1])
    between = 0.5 * (g[1:] + g[:-1]) / np.sqrt((u[1:] - u[:-1]) ** 2 + turn**2 + aos.SMOOTHING)
    a, b, d = number[1:].ravel(), number[:-1].ravel(), between.ravel()
    rows, columns = np.concatenate((a, b, a, b)), np.concatenate((b, a, a, b))
    return coo_matrix((np.concatenate((d, d, -d, -d)), (rows, columns)), shape=(u.size, u.size)).tocsc()


def sparse_lu(z: Map, g: Map, means: Map, limit: int = 500, tolerance: float = 1e-4) -> tuple[Map, int]:
    """Additive operator splitting of one map, both systems of an iteration factorised by a general sparse LU."""
    r = (z - means[0]) ** 2 - (z - means[1]) ** 2
    force = DATA_WEIGHT * r / np.abs(r).max()
    strength = aos.PENALTY * np.abs(force).max() / 2
    u, step = (z - z.min()) / np.ptp(z), aos.FIRST_STEP
    number = np.arange(z.size).reshape(z.shape)
    for done in range(1, limit + 1):
        outside = np.sqrt((2 * u - 1) ** 2 + aos.WIDTH) - 1
        rise = 0.5 + np.arctan(outside / aos.WIDTH) / np.pi
        bump = aos.WIDTH * outside / (np.pi * (aos.WIDTH**2 + outside**2))
        penalty = (4 * u - 2) / (outside + 1) * (bump + rise)
        near = (np.abs(u) <= aos.WIDTH) | (np.abs(u - 1) <= aos.WIDTH)
        implicit = 1 / (1 + step * strength * aos.CURVATURE * near)
        right = (u - step * implicit * (force + strength * penalty)).ravel()
        after = np.zeros(z.size)
        for axis in (0, 1):
            system = diags(np.ones(z.size)) - 2 * step * diags(implicit.ravel()) @ _operator(u, g, axis, number)
            after += 0.5 * splu(system.tocsc()).solve(right)
        change = np.linalg.norm(after - u.ravel()) / np.linalg.norm(after)
        u = after.reshape(z.shape)
        if change <= tolerance:
            break
        if done % aos.DECAY_EVERY == 0:
            step = max(aos.LAST_STEP, aos.STEP_DECAY * step)
    return u.clip(0, 1), done


def _timed(work: Callable[[], TwoPhase], repeats: int) -> tuple[float, TwoPhase]:
    result, times = work(), []
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return statistics.median(times), result


def _plain_torch(z: torch.Tensor, g: torch.Tensor, means: torch.Tensor) -> TwoPhase:
    found = primal_dual_torch(
        z, g, start(z), means, data_weight=DATA_WEIGHT, free_means=False, max_iterations=5000, tolerance=1e-3
    )
    energy = two_phase_energy(found.u, z, found.means, data_weight=DATA_WEIGHT, edge_weight=g)
    return TwoPhase(found.u, found.means, energy, int(found.iterations.max()), found.gap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--maps", type=int, default=32)
    parser.add_argument("--reference-maps", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="8 maps of 96 px")
    arguments = parser.parse_args()
    size, count, few = arguments.size, arguments.maps, arguments.reference_maps
    if arguments.quick:
        size, count, few = 96, 8, 1

    z = contrast_like(count, size)
    began = time.perf_counter()
    segment_two_phase(z[:1, :8, :8])
    first = time.perf_counter() - began
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    free, found = _timed(lambda: segment_two_phase(z), 3)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    g, means = edge_weight(z), found.means

    def energies(u: torch.Tensor) -> tuple[float, float]:
        pair = [
            two_phase_energy(each, z[:few], means[:few], data_weight=DATA_WEIGHT, edge_weight=g[:few]).mean().item()
            for each in (u, (u > 0.5).float())
        ]
        return pair[0], pair[1]

    solved, began = [], time.perf_counter()
    for n in range(few):
        one = (each[n].double().numpy() for each in (z, g, means))
        solved.append(sparse_lu(*one))
    reference = (time.perf_counter() - began) / few
    rows = [
        (
            "sparse-LU AOS",
            reference,
            max(each[1] for each in solved),
            torch.from_numpy(np.stack([each[0] for each in solved])).float(),
        )
    ]
    runs: dict[str, Callable[[], TwoPhase]] = {
        "aos (batched)": lambda: segment_two_phase(z, means=means, solver="aos"),
        "primal_dual, plain torch": lambda: _plain_torch(z, g, means),
        "primal_dual (fused)": lambda: segment_two_phase(z, means=means),
        "primal_dual, gap 1e-4": lambda: segment_two_phase(z, means=means, tolerance=1e-4),
    }
    for name, work in runs.items():
        seconds, result = _timed(work, 1 if name.startswith("aos") else 3)
        rows.append((name, seconds / count, result.iterations, result.u[:few]))

    print(
        f"{count} maps of {size} px (reference: {few}), {torch.get_num_threads()} threads, "
        f"means fixed, lambda {DATA_WEIGHT}"
    )
    print(f"{'solver':26} {'ms/map':>10} {'ratio':>8} {'iterations':>10} {'energy':>11} {'of u > .5':>11}")
    for name, seconds, iterations, u in rows:
        energy, masked = energies(u)
        print(
            f"{name:26} {1e3 * seconds:10.2f} {reference / seconds:8.0f} {iterations:10d} {energy:11.1f} {masked:11.1f}"
        )
    free /= count
    print(f"{'primal_dual, free means':26} {1e3 * free:10.2f} {reference / free:8.0f} {found.iterations:10d}")
    print(f"goal: ratio of primal_dual >= {GOAL} at an energy not above the reference's")
    print(f"first call, kernels compiled or loaded: {first:.2f} s")
    print(f"peak memory beyond z: {peak / 4 / z.numel():.1f} floats per px")


if __name__ == "__main__":
    main()
