"""Does a frozen encoder push class maps the right way? The gradient of the matching losses against the truth.

    OMP_NUM_THREADS=1 TISSUEHINT_DATA=DIR uv run python benchmarks/matching_signal.py pbip/glas

Before a long training: how much can matching help with this encoder? Windows of val that hold two tissues get random
weight maps of 7 x 7 cells, the pictures that these cut out go through the encoder of a pbip recipe, and the cells that
a loss reaches are ranked by its gradient on their weight. AUC of that ranking against the truth (cells more than half
in the class): 1 says that the loss raises the right cells, .5 that it knows nothing. ``random``:
weights are uniform noise; ``half right``: the mean of noise and truth. Beside it how often the true cut-outs are told
apart: the share of pictures (cut out and left over) that look more like the prototypes of their own side.

Masks are used for this measurement only, and never those of test.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tissuehint.data.module import TissueData, load_dataset
from tissuehint.data.training_sets import HintSet
from tissuehint.methods.pbip import PBIP
from tissuehint.nn.masked_images import masked_image_losses
from tissuehint.nn.matching import Pairs, adaptive_weights, matching_losses
from tissuehint.nn.prototypes import by_class
from tissuehint.pipeline.recipe import load_recipe, parse_override

CELLS = 7
SHARES = (0.15, 0.85)  # of a window that its class covers


def windows_of_two(items: HintSet, data: TissueData, most: int) -> list[tuple[int, int, Tensor]]:
    """Item, class and its mask (h,w) of windows that are partly of the class."""
    assert items.tags is not None
    assert items.grid is not None
    found = []
    for place in np.random.default_rng(0).permutation(np.flatnonzero(items.tags.sum(1) > 1)):
        record, (top, left) = items.records[items.owner[place]], items.corners[place]
        mask = record.read_mask(data.labels)[top : top + items.grid.side, left : left + items.grid.side]
        for number in np.flatnonzero(items.tags[place]):
            own = mask == number
            if SHARES[0] <= own.mean() <= SHARES[1]:
                found.append((int(place), int(number), torch.from_numpy(own).float()))
        if len(found) >= most:
            break
    return found[:most]


def measure(method: PBIP, images: Tensor, classes: Tensor, truth: Tensor) -> None:
    """Print the numbers of one encoder."""
    encoder, prototypes = method.image_encoder, by_class(method.prototypes(), method.counts)
    side = (encoder.side, encoder.side)
    pictures = encoder.normalization(encoder.resize(images))
    exact = F.interpolate(truth[:, None], side, mode="nearest")[:, 0]
    with torch.no_grad():
        both = [method.encode(weights[:, None] * pictures) for weights in (exact, 1 - exact)]
        # the losses without their softplus: above 0 where the wrong side is nearer
        logits = [torch.expm1(loss).log() for loss in each_loss(both, prototypes, classes)]
    apart = torch.cat(logits).lt(0).double().mean()
    print(f"true cut-outs told apart: {float(apart):.2f} of {2 * len(images)}")
    cells = F.adaptive_avg_pool2d(truth[:, None], CELLS)
    noise = torch.rand(cells.shape, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(torch.arange(len(images)), classes, None)
    for name, start in (("random", noise), ("half right", (cells + noise) / 2)):
        start.requires_grad_()
        maps = F.interpolate(start, side, mode="bilinear", align_corners=False)[:, 0]
        weights = adaptive_weights(maps, method.config.matching.threshold)
        losses = masked_image_losses(*weights, pictures, pairs, prototypes, method.encode, counts=method.counts)
        aucs = []
        for loss in losses:
            assert loss is not None
            (gradient,) = torch.autograd.grad(loss, start, retain_graph=True)
            aucs.append(mean_auc(cells, -gradient))
        print(f"{name:10s}  AUC of the gradient: foreground {aucs[0]:.3f}, background {aucs[1]:.3f}")


def each_loss(features: list[Tensor], prototypes: Tensor, classes: Tensor) -> list[Tensor]:
    """Foreground and background loss of each pair by itself."""
    rows = [
        matching_losses(front[None], back[None], prototypes, number[None])
        for front, back, number in zip(*features, classes, strict=True)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def mean_auc(cells: Tensor, scores: Tensor) -> float:
    """Mean over the windows that have cells of both kinds among those that the gradient reaches."""
    found = []
    for own, score in zip(cells.flatten(1) > 0.5, scores.flatten(1), strict=True):
        reached = score != 0
        truth = own[reached].numpy()
        if 0 < truth.sum() < truth.size:
            found.append(roc_auc_score(truth, score[reached].numpy()))
    return float(np.mean(found))


def main() -> None:
    """Build the bank of the recipe and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a pbip recipe, file or shipped name")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--windows", type=int, default=160)
    words = parser.parse_args()
    recipe = load_recipe(words.recipe, dict(parse_override(text) for text in words.override))
    data = TissueData(load_dataset(recipe.data), recipe.data, recipe.seed)
    torch.manual_seed(recipe.seed)
    method = PBIP(recipe.method, data.labels).eval()  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        method.prepare(data, Path(folder))
    items = data.hints("val", "tags")
    found = windows_of_two(items, data, words.windows)
    images = torch.stack([items.sample(place).image for place, _, _ in found])
    measure(method, images, torch.tensor([number for _, number, _ in found]), torch.stack([own for _, _, own in found]))


if __name__ == "__main__":
    main()
