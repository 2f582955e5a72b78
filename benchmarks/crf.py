"""The dense CRF against pydensecrf, and its grid against its exact way: time, and how far the results agree.

First table: processor time of one image of 224 x 224 with 5 classes, both in turn in every round, least of several
rounds, and the agreement of the two: mean |dQ|, and the share of pixels of the same class. pydensecrf is not among the
dependencies; it is left out (nan) where it cannot be imported. To have it here, where a compiler is at hand:

    uv pip install --target FOLDER pydensecrf2
    export PYTHONPATH=FOLDER

Second table, 96 x 96: agreement with the exact mean field, of the grid, of pydensecrf, and of doing nothing.

Images are smooth synthetic tissue, uniform noise (the worst case: it has all colours), and where the folder named by
``--data`` or TISSUEHINT_DATA exists, the middles of real ones. The probabilities are smooth blobs that do not know the
image, so that the CRF has much to change; those of a good network are easier. Run it with one thread.

    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/crf.py [--data ../shared/data] [--rounds 3]
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tissuehint.ops.crf import PROBABILITY_FLOOR, dense_crf

SIDE, SMALL, CLASSES, ITERATIONS = 224, 96, 5, 5
FOLDERS = ("glas", "wsss4luad", "ebhi-seg")


def smooth(channels: int, side: int, cells: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(1, channels, cells, cells, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic")


def probabilities(side: int) -> Tensor:
    return (2 * smooth(CLASSES, side, side // 16, torch.Generator().manual_seed(0))).softmax(1)


def synthetic(side: int) -> Tensor:
    """Large regions with nuclei and grain in pink and violet."""
    generator = torch.Generator().manual_seed(1)
    region, nuclei = smooth(1, side, side // 32, generator), smooth(1, side, side // 7, generator).clamp_min(0)
    tint = torch.tensor([0.1, 0.2, 0.05])[:, None, None]
    image = torch.tensor([0.85, 0.65, 0.8])[:, None, None] - tint * region - 1.5 * tint * nuclei
    return (image + 0.02 * torch.randn(1, 3, side, side, generator=generator)).clamp(0, 1)


def pictures(data: Path, side: int) -> Iterator[tuple[str, Tensor]]:
    """(1,3,H,W) of the grey levels of 8 bits, as pydensecrf takes them."""
    yield "synthetic", (synthetic(side) * 255).round() / 255
    yield "noise", torch.randint(256, (1, 3, side, side), generator=torch.Generator().manual_seed(0)) / 255
    for folder in FOLDERS:
        files = [
            each for each in sorted((data / folder).rglob("*.*")) if each.suffix.lower() in {".jpg", ".jpeg", ".png"}
        ]
        files = [each for each in files if not {"label", "mask", "background-mask"} & set(each.parts)]
        for file in [each for each in files if "anno" not in each.stem][20:21]:
            with Image.open(file) as opened:
                pixels = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1)[None] / 255
            top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
            if min(top, left) >= 0:
                yield folder, pixels[:, :, top : top + side, left : left + side].contiguous()


def pydensecrf() -> ModuleType | None:
    try:
        return importlib.import_module("pydensecrf.densecrf")
    except ImportError:
        return None


def theirs(module: ModuleType, given: Tensor, image: Tensor) -> Tensor:
    _, classes, height, width = given.shape
    field = module.DenseCRF2D(width, height, classes)
    field.setUnaryEnergy(-given[0].flatten(1).clamp_min(PROBABILITY_FLOOR).log().contiguous().numpy())
    field.addPairwiseGaussian(sxy=15, compat=30)
    colours = np.ascontiguousarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
    field.addPairwiseBilateral(sxy=10, srgb=20, rgbim=colours, compat=50)
    return torch.from_numpy(np.array(field.inference(ITERATIONS))).view(given.shape)


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def agreement(one: Tensor, other: Tensor) -> str:
    same = (one.argmax(1) == other.argmax(1)).double().mean()
    return f"{float((one - other).abs().mean()):9.5f} {100 * float(same):7.2f}"


def speed(name: str, image: Tensor, module: ModuleType | None, rounds: int) -> None:
    given, ours_s, their_s = probabilities(SIDE), [], []
    for _ in range(rounds):
        seconds, ours = timed(lambda: dense_crf(given, image))
        ours_s.append(seconds)
        if module:
            seconds, other = timed(lambda: theirs(module, given, image))
            their_s.append(seconds)
    ratio = f"{min(their_s):10.2f} {min(ours_s) / min(their_s):6.2f}" if their_s else f"{'nan':>10} {'nan':>6}"
    print(f"{name:10} {min(ours_s):8.2f} {ratio} {agreement(ours, other) if their_s else ''}", flush=True)


def accuracy(name: str, image: Tensor, module: ModuleType | None) -> None:
    given = probabilities(SMALL)
    exact = dense_crf(given, image, bilateral="exact")
    print(f"{name:10} grid       {agreement(dense_crf(given, image, bilateral='grid'), exact)}")
    if module:
        print(f"{name:10} pydensecrf {agreement(theirs(module, given, image), exact)}")
    print(f"{name:10} input      {agreement(given, exact)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("TISSUEHINT_DATA", "../shared/data")))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    module = pydensecrf()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} threads")
    if not module:
        print("pydensecrf is not installed, or does not build here")
    print(f"{SIDE} x {SIDE}, {CLASSES} classes, {ITERATIONS} iterations; seconds, ratio, mean |dQ|, % of equal pixels")
    print(f"{'image':10} {'seconds':>8} {'pydensecrf':>10} {'ratio':>6} {'|dQ|':>9} {'equal':>7}")
    for name, image in pictures(arguments.data, SIDE):
        speed(name, image, module, arguments.rounds)
    print(f"against the exact mean field, {SMALL} x {SMALL}")
    for name, image in pictures(arguments.data, SMALL):
        accuracy(name, image, module)


if __name__ == "__main__":
    main()
