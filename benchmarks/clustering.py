"""Spherical k-means against scikit-learn's k-means on the same unit vectors: time, and what it finds.

Features are as deep ones are: a mean direction common to all, a direction of each blob, noise; a fifth has no blob.
scikit-learn runs with its own tolerance (it stops before it has converged) and as many starts. ``cosine`` is the mean
cosine of the features with the direction of the mean of their cluster, of either partition, the larger the better;
``agreement`` the adjusted Rand index of both. Least processor time of several rounds; run it with one thread.

    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/clustering.py [--features 20000] [--dim 512] [--clusters 3 10]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from tissuehint.ops.clustering import RESTARTS, spherical_kmeans

SPREADS = {"far": 0.5, "near": 2.0}  # length of the noise, by that of the directions of the blobs


def blobs(number: int, dim: int, clusters: int, spread: float) -> Tensor:
    """(M,D) float32 of lengths between 1/2 and 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / dim**0.5

    directions = normal(clusters, dim)
    part = directions[torch.randint(clusters, (number,), generator=generator)]
    part[: number // 5] = 0
    features = normal(1, dim) + part + spread * normal(number, dim)
    return features * 2 ** (2 * torch.rand(number, 1, generator=generator) - 1)


def mean_cosine(points: Tensor, labels: Tensor) -> float:
    sums = torch.zeros(int(labels.max()) + 1, points.shape[1], dtype=torch.float64)
    return float(sums.index_add_(0, labels, points.double()).norm(dim=1).sum()) / len(points)


def least(work: Callable[[], Tensor], rounds: int) -> tuple[float, Tensor]:
    """Seconds, and the labels found."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        labels = work()
        times.append(time.process_time() - began)
    return min(times), labels


def compare(number: int, dim: int, clusters: int, blob: str, rounds: int) -> None:
    features = blobs(number, dim, clusters, SPREADS[blob])
    points = F.normalize(features)
    theirs = KMeans(clusters, n_init=RESTARTS, random_state=0)
    ours_s, ours = least(lambda: spherical_kmeans(features, clusters).labels, rounds)
    their_s, found = least(lambda: torch.from_numpy(theirs.fit(points.numpy()).labels_).long(), rounds)
    print(
        f"{blob:5} {clusters:3} {ours_s:9.2f} {their_s:12.2f} {ours_s / their_s:6.2f} "
        f"{mean_cosine(points, ours):9.6f} {mean_cosine(points, found):12.6f} {adjusted_rand_score(ours, found):9.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, nargs="*", default=[3, 10])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads; {RESTARTS} starts")
    print(f"{arguments.features} features of {arguments.dim} numbers; seconds, ratio, mean cosine of both")
    print(f"{'blobs':5} {'k':>3} {'seconds':>9} {'scikit-learn':>12} {'ratio':>6} ", end="")
    print(f"{'cosine':>9} {'scikit-learn':>12} {'agreement':>9}")
    for blob in SPREADS:
        for clusters in arguments.clusters:
            compare(arguments.features, arguments.dim, clusters, blob, arguments.rounds)


if __name__ == "__main__":
    main()
