"""Chambolle-Pock for the two-phase model in fused numba kernels: the CPU path, one map per thread.

The same algorithm as in ``variational_primal_dual``, which stays its oracle. Three things make it fast. The dual and
the primal step of a row share one pass. Several iterations share one pass over the map: iteration k + 1 handles a
row as soon as iteration k has handled the next one, so that rows come from the cache (temporal blocking). A map is
solved in one call without the interpreter lock, by as many plain threads as torch uses; there is no threading layer
that a forked data-loading worker could break.

The kernels assume finite input (the caller checks it), since they are compiled with fast arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from tissuehint.ops.variational_model import MEANS_TOLERANCE, NO_CONTRAST, SMALLEST_PHASE, Solution
from tissuehint.ops.variational_primal_dual import (
    CHECK_EVERY,
    DUAL_STEP,
    MEANS_UPDATES,
    PRIMAL_STEP,
    RELAXATION,
)

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile on first use and keep the result on disk, where a place for it can be written."""
    try:
        kernel: Any = njit(nogil=True, fastmath=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # numba found no directory for its cache
        kernel = njit(nogil=True, fastmath=True, error_model="numpy")(function)
    return cast(Function, kernel)


@compiled
def _row(
    i: int, u: Array, p: Array, g: Array, z: Array, number: Array, relax: float, above: Array, here: Array, flow: Array
) -> None:
    """One iteration on row i: both dual components, then u.

    ``number`` holds gain, offset, primal step, dual step, 0, 1 and a tiny value in the type of the map, so that no
    float64 slips in. ``above`` and ``here`` hold the extrapolated dual across rows of rows i - 1 and i, ``flow`` the
    one along row i, shifted by one.
    """
    gain, offset, primal, dual, zero, one, tiny = number
    last = u.shape[1] - 1
    now, below = u[i], u[min(i + 1, u.shape[0] - 1)]
    across, along, weight, row = p[0, i], p[1, i], g[i], z[i]
    for j in range(last):
        a = across[j] + dual * (below[j] - now[j])
        b = along[j] + dual * (now[j + 1] - now[j])
        shrink = weight[j] / math.sqrt(a * a + b * b + tiny)
        shrink = shrink if shrink < one else one
        a = a * shrink - across[j]
        b = b * shrink - along[j]
        here[j] = across[j] + a + a
        flow[j + 1] = along[j] + b + b
        across[j] += relax * a
        along[j] += relax * b
    a = across[last] + dual * (below[last] - now[last])
    shrink = weight[last] / (abs(a) + tiny)
    a = a * (shrink if shrink < one else one) - across[last]
    here[last] = across[last] + a + a
    across[last] += relax * a
    flow[last + 1] = zero
    for j in range(last + 1):
        v = now[j] + primal * (here[j] - above[j] + flow[j + 1] - flow[j] - gain * row[j] - offset)
        v = v if v > zero else zero
        v = v if v < one else one
        now[j] += relax * (v - now[j])


@compiled
def _iterate(
    u: Array, p: Array, g: Array, z: Array, number: Array, relax: Array, dual_rows: Array, flow: Array
) -> None:
    """As many iterations as ``relax`` has entries, in one pass over the map."""
    dual_rows[:] = number[4]
    flow[0] = number[4]
    height, levels = u.shape[0], len(relax)
    for front in range(height + levels - 1):
        for level in range(max(0, front - height + 1), min(levels, front + 1)):
            i = front - level
            rows = dual_rows[level]
            _row(i, u, p, g, z, number, relax[level], rows[(i + 1) % 2], rows[i % 2], flow)


@compiled
def _measure(u: Array, p: Array, g: Array, z: Array, number: Array) -> tuple[float, float, float, float]:
    """Primal energy, dual energy, sum of u and sum of z u; rows in the type of the map, their sums in float64."""
    gain, offset, zero = number[0], number[1], number[4]
    height, width = u.shape
    primal, dual, area, product = 0.0, 0.0, 0.0, 0.0
    for i in range(height):
        below, before = min(i + 1, height - 1), max(i - 1, 0)
        first = number[5] if i > 0 else zero
        row_primal, row_dual, row_area, row_product = zero, zero, zero, zero
        for j in range(width):
            down, right = u[below, j] - u[i, j], u[i, min(j + 1, width - 1)] - u[i, j]
            force = gain * z[i, j] + offset
            row_primal += g[i, j] * math.sqrt(down * down + right * right) + force * u[i, j]
            row_area += u[i, j]
            row_product += u[i, j] * z[i, j]
            left = p[1, i, j - 1] if j > 0 else zero
            rest = force - (p[0, i, j] - first * p[0, before, j] + p[1, i, j] - left)
            row_dual += rest if rest < zero else zero
        primal += row_primal
        dual += row_dual
        area += row_area
        product += row_product
    return primal, dual, area, product


@compiled
def _force(means: Array, low: float, high: float, data_weight: float, number: Array) -> None:
    """Write gain and offset of ``lambda r = gain z + offset`` into ``number`` (see ``force_coefficients``)."""
    total, difference = means[0] + means[1], means[1] - means[0]
    largest = max(abs(2 * low - total), abs(2 * high - total))
    number[:2] = 0
    if largest * abs(difference) > NO_CONTRAST:
        scale = data_weight * np.sign(difference) / largest
        number[0] = 2 * scale
        number[1] = -total * scale


@compiled
def _fresh_means(means: Array, area: float, product: float, mass: float, pixels: int) -> tuple[float, float]:
    """Closed-form means from the sums of u, z u and z; a phase that is almost empty keeps its mean."""
    inside, outside = means[0], means[1]
    if area > SMALLEST_PHASE * pixels:
        inside = product / area
    if pixels - area > SMALLEST_PHASE * pixels:
        outside = (mass - product) / (pixels - area)
    return inside, outside


@compiled
def _solve(
    z: Array,
    g: Array,
    u: Array,
    means: Array,
    number: Array,
    data_weight: float,
    free: bool,
    limit: int,
    accuracy: float,
) -> tuple[int, float]:
    """Solve one map in place (u and means); iterations and duality gap."""
    height, width = z.shape
    p = np.zeros((2, height, width), z.dtype)
    dual_rows, flow = np.empty((CHECK_EVERY, 2, width), z.dtype), np.empty(width + 1, z.dtype)
    relax = np.full(CHECK_EVERY, RELAXATION, z.dtype)
    relax[-1] = 1  # ends inside the constraints
    low, high, mass = z.min(), z.max(), 0.0
    for i in range(height):
        mass += z[i].sum()
    _force(means, low, high, data_weight, number)
    done, updates = 0, 0
    while True:
        steps = min(CHECK_EVERY, limit - done)
        _iterate(u, p, g, z, number, relax[CHECK_EVERY - steps :], dual_rows, flow)
        done += steps
        primal, dual, area, product = _measure(u, p, g, z, number)
        if free and done < limit and updates < MEANS_UPDATES:
            inside, outside = _fresh_means(means, area, product, mass, height * width)
            if max(abs(inside - means[0]), abs(outside - means[1])) > MEANS_TOLERANCE * (high - low):
                means[0], means[1] = inside, outside
                updates += 1
                _force(means, low, high, data_weight, number)
                continue
        if primal - dual <= accuracy * max(abs(primal), 1.0) or done >= limit:
            return done, max(primal - dual, 0.0)


def primal_dual_fused(
    z: torch.Tensor,
    weight: torch.Tensor,
    u: torch.Tensor,
    means: torch.Tensor,
    *,
    data_weight: float,
    free_means: bool,
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Solve maps on the CPU; arguments and result are those of ``primal_dual_torch``, but u is changed in place.

    Beside its input and output it holds 2 floats per px for each map in work, that is for at most
    ``torch.get_num_threads()`` maps at a time.
    """
    centres = means.to(torch.float64, copy=True)
    maps, weights, result, pairs = z.numpy(), weight.contiguous().numpy(), u.numpy(), centres.numpy()
    constants = np.array([0, 0, PRIMAL_STEP, DUAL_STEP, 0, 1, 1e-30], maps.dtype)

    def solve(n: int) -> tuple[int, float]:
        done: tuple[int, float] = _solve(
            maps[n],
            weights[n],
            result[n],
            pairs[n],
            constants.copy(),
            float(data_weight),
            free_means,
            max_iterations,
            float(tolerance),
        )
        return done

    threads = min(torch.get_num_threads(), len(maps))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            solved = list(pool.map(solve, range(len(maps))))
    else:
        solved = [solve(n) for n in range(len(maps))]
    iterations = torch.tensor([each[0] for each in solved], dtype=torch.int64)
    gap = torch.tensor([each[1] for each in solved], dtype=torch.float64)
    return Solution(u, centres.to(z.dtype), iterations, gap)
