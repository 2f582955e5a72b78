"""Iterations of the multi-class model in a fused numba kernel: the CPU path, one map per thread.

The same steps as ``variational_multiclass`` takes with torch, which stays their oracle: one pass over a map for the
dual step of every class, one for the primal step with its projection. Loops run along rows, so that they are
vectorised. The kernel assumes finite input (the caller checks it), since it is compiled with fast arithmetic.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from tissuehint.ops.variational_fused import Array, compiled


@compiled
def _dual_step(ahead: Array, field: Array, edge: Array, number: Array) -> None:
    """Field (2,H,W) of one class from its extrapolated map (H,W); it stays 0 where it would leave the map."""
    _, one, half, tiny = number
    height, last = ahead.shape[0], ahead.shape[1] - 1
    for i in range(height):
        now, below = ahead[i], ahead[min(i + 1, height - 1)]
        across, along, weight = field[0, i], field[1, i], edge[i]
        for j in range(last):
            down = across[j] + half * (below[j] - now[j])
            right = along[j] + half * (now[j + 1] - now[j])
            shrink = weight[j] / max(math.sqrt(down * down + right * right), tiny)
            shrink = shrink if shrink < one else one
            across[j] = down * shrink
            along[j] = right * shrink
        down = across[last] + half * (below[last] - now[last])
        shrink = weight[last] / max(abs(down), tiny)
        across[last] = down * (shrink if shrink < one else one)


@compiled
def _project(values: Array, threshold: Array, number: Array) -> None:
    """Columns (K,W) to the simplex, in place.

    What is above the threshold sums to 1; each round leaves those out that are not above the last one (Michelot, 1986).
    """
    zero, one = number[0], number[1]
    classes, width = values.shape
    for j in range(width):
        largest = values[0, j]
        for k in range(1, classes):
            largest = max(largest, values[k, j])
        total = -one
        for k in range(classes):
            values[k, j] -= largest
            total += values[k, j]
        threshold[j] = total / classes
    for _ in range(classes - 1):
        for j in range(width):
            total, count = -one, zero
            for k in range(classes):
                kept = values[k, j] > threshold[j]
                total += values[k, j] if kept else zero
                count += one if kept else zero
            threshold[j] = total / count
    for k in range(classes):
        for j in range(width):
            rest = values[k, j] - threshold[j]
            values[k, j] = rest if rest > zero else zero


@compiled
def _mean(ahead: Array, weights: Array, total: float) -> float:
    """Weighted mean of a map (H,W), its rows added in float64."""
    area = 0.0
    for i in range(ahead.shape[0]):
        area += (ahead[i] * weights[i]).sum()
    return area / total


@compiled
def _advance(
    steps: int,
    u: Array,
    ahead: Array,
    field: Array,
    bias: Array,
    cost: Array,
    edge: Array,
    weights: Array,
    tau: Array,
    proportions: Array,
    total: float,
    scale: float,
    limit: float,
    number: Array,
) -> None:
    """Steps on one map, in place: u and ahead (K,H,W), field (2,K,H,W), bias (K,).

    ``number`` holds 0, 1, the dual step and a tiny value in the type of the map, so that no float64 slips in.
    """
    zero, one = number[0], number[1]
    classes, height, width = u.shape
    values, threshold = np.empty((classes, width), u.dtype), np.empty(width, u.dtype)
    for _ in range(steps):
        for k in range(classes):
            _dual_step(ahead[k], field[:, k], edge, number)
            if limit > 0:
                moved = bias[k] + (_mean(ahead[k], weights, total) - proportions[k]) / scale
                bias[k] = min(max(moved, -limit), limit)
        for i in range(height):
            step, weight = tau[i], weights[i]
            inside = one if i > 0 else zero
            for k in range(classes):
                now, price, push, row = u[k, i], cost[k, i], bias[k], values[k]
                above, across, along = field[0, k, max(i - 1, 0)], field[0, k, i], field[1, k, i]
                slope = price[0] + inside * above[0] - across[0] - along[0] + weight[0] * push
                row[0] = now[0] - step[0] * slope
                for j in range(1, width):
                    slope = price[j] + inside * above[j] - across[j] + along[j - 1] - along[j] + weight[j] * push
                    row[j] = now[j] - step[j] * slope
            _project(values, threshold, number)
            for k in range(classes):
                now, further, row = u[k, i], ahead[k, i], values[k]
                for j in range(width):
                    further[j] = row[j] + row[j] - now[j]
                    now[j] = row[j]


class FusedSteps:
    """Steps on the maps of a batch, in place.

    Args:
        u, ahead, field, bias: the state, (B,K,H,W), (B,K,H,W), (2,B,K,H,W), (B,K); contiguous, on the CPU.
        given: cost (B,K,H,W), edges, weights and primal steps (B,H,W), proportions (B,K).
        total: weight of all pixels (B,).
        scale: largest weight (B,).
        limit: largest bias; 0 without the area term.
    """

    def __init__(
        self,
        u: Tensor,
        ahead: Tensor,
        field: Tensor,
        bias: Tensor,
        given: list[Tensor],
        total: Tensor,
        scale: Tensor,
        *,
        limit: float,
    ) -> None:
        self.arrays = [each.numpy() for each in (u, ahead, field.movedim(0, 1), bias)]
        self.arrays += [each.contiguous().numpy() for each in given]
        self.total, self.scale, self.limit = total.tolist(), scale.tolist(), limit
        self.number = np.array([0, 1, 0.5, 1e-12], self.arrays[0].dtype)

    def __call__(self, steps: int, going_on: Tensor) -> None:
        """So many steps on the maps where ``going_on`` (B,)."""
        chosen = going_on.nonzero()[:, 0].tolist()
        threads = min(torch.get_num_threads(), len(chosen))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda n: self._carry_on(n, steps), chosen))
        else:
            for n in chosen:
                self._carry_on(n, steps)

    def _carry_on(self, n: int, steps: int) -> None:
        u, ahead, field, bias, cost, edge, weights, tau, proportions = (each[n] for each in self.arrays)
        scalars = (self.total[n], self.scale[n], self.limit)
        _advance(steps, u, ahead, field, bias, cost, edge, weights, tau, proportions, *scalars, self.number)
