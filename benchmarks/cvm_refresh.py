"""What the variational part of CVM costs beside an epoch of training.

In one run, in turn: a training step (forward, losses, backward, optimiser) of a batch, and what a refresh does to the
same images: the network's features, then contrast maps, two-phase segmentations and their mean. The variational part
is all but the forward pass. A refresh happens at most once an epoch. Goal: variational part under 10 % of the epoch.

    OMP_NUM_THREADS=1 uv run python benchmarks/cvm_refresh.py
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tissuehint.data.samples import Batch, collate
from tissuehint.labels import LabelSpace
from tissuehint.methods.cvm import CVM, CVMConfig
from tissuehint.methods.cvm.complement import complement
from tissuehint.nn.config import EncoderConfig, NetworkConfig
from tissuehint.testing.fakes import fake_data, fake_dataset

GOAL = 0.10


def main() -> None:
    """Print seconds an image and the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=256, help="of the working grid, pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--sides", choices=("target", "both"), default="target")
    parser.add_argument("--encoder", default="mobilenetv2_100")
    words = parser.parse_args()
    torch.manual_seed(0)
    labels = LabelSpace(("rest", "target"))
    network = NetworkConfig(architecture="unet", encoder=EncoderConfig(name=words.encoder))
    method = CVM(CVMConfig(network=network, sides=words.sides), labels)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    data = fake_data(fake_dataset(labels, count=(words.batch, 0, 0), size=words.side))
    items = data.hints("train", "points")
    batch = collate([items.sample(index) for index in range(len(items))])
    steps, forwards, solves = [], [], []
    for _ in range(words.turns + 1):
        steps.append(_step(method, optimizer, batch))
        method.eval()
        with torch.no_grad():
            start = time.perf_counter()
            dense = method.network.dense(batch.images)
            middle = time.perf_counter()
            complement(method.config, method.targets, dense.features, dense.logits, batch.need_points())
            end = time.perf_counter()
        forwards.append(middle - start)
        solves.append(end - middle)
        method.train()
    # the first turn compiles and warms up
    step, forward, solve = (statistics.median(times[1:]) / len(batch) for times in (steps, forwards, solves))
    points = sum(int((rows[:, 2] == target).sum()) for rows in batch.need_points() for target in method.targets)
    print(f"{words.batch} images of {words.side} px, {points / len(batch):.1f} solutions an image, {words.encoder}")
    print(
        f"training {1e3 * step:.0f} ms an image, features {1e3 * forward:.0f} ms, variational part {1e3 * solve:.1f} ms"
    )
    share = solve / (step + forward + solve)
    print(f"variational part {share:.3f} of an epoch that ends with a refresh (goal under {GOAL}),")
    print(f"the whole refresh {(forward + solve) / (step + forward + solve):.3f}")


def _step(method: CVM, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    start = time.perf_counter()
    loss = torch.stack(list(method.losses(batch).values())).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
