"""Pictures of the prototypes of a trained LPD: where each of them looks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from tissuehint.data.module import TissueData
from tissuehint.data.samples import Batch, collate
from tissuehint.data.training_sets import HintSet
from tissuehint.files import atomic_path, write_json
from tissuehint.methods.sheets import heat, picture, sheet, spread

if TYPE_CHECKING:
    from tissuehint.methods.lpd.method import LPD

COUNTED = 256  # patches that coverage and overlap are measured on
BATCH = 16
SHOWN = 4  # patches of each class
THUMBNAIL = 84  # their side in pixels
GAP = 3
NUMBERS = "diversity.json"
PICTURES = "pictures.json"


def write_pictures(method: LPD, data: TissueData, folder: Path) -> None:
    """A sheet a class, one row a patch: the patch, its class map, and the heatmap of each prototype.

    Patches are those of val, or of train where there is no val. Coverage and overlap of each class stand in the
    captions and in ``diversity.json``.
    """
    split = "val" if data.records("val") else "train"
    items = data.hints(split, method.supervision)
    places = spread(len(items), COUNTED)
    coverage, overlap = _measured(method, items, places)
    folder.mkdir(parents=True, exist_ok=True)
    names = method.labels.names[: method.labels.num_tissue]
    pictures, first = [], 0
    for number, (name, count) in enumerate(zip(names, method.counts, strict=True)):
        caption = f"{name}: coverage {_told(coverage[number])}, overlap {_told(overlap[number])}"
        rows = [_row(method, items, place, number, range(first, first + count)) for place in _with_tag(items, number)]
        first += count
        if not rows:
            continue
        file = f"prototypes_{number}.png"
        with atomic_path(folder / file) as part:
            Image.fromarray(sheet(rows, GAP)).save(part, format="PNG")
        pictures.append({"file": file, "caption": caption})
    numbers = {
        "split": split,
        "patches": len(places),
        "coverage": {name: _finite(value) for name, value in zip(names, coverage, strict=True)},
        "overlap": {name: _finite(value) for name, value in zip(names, overlap, strict=True)},
    }
    write_json(folder / NUMBERS, numbers)
    text = (
        f"Patches of {split}: the patch, its class map, and where each prototype of the class looks (bright: similar). "
        f"Coverage: share of a region in which some prototype has its top fifth; overlap: intersection over union of "
        f"two prototypes' top fifths; {len(places)} patches. Alike prototypes have coverage .2 and overlap 1."
    )
    write_json(folder / PICTURES, {"title": "Prototypes", "text": text, "pictures": pictures})


def _measured(method: LPD, items: HintSet, places: list[int]) -> tuple[list[float], list[float]]:
    """Coverage and overlap of each class, means over the batches."""
    found = []
    for start in range(0, len(places), BATCH):
        batch = collate([items.sample(place) for place in places[start : start + BATCH]]).to(method.device)
        found.append(torch.stack(list(method.coverage(batch))))
    means = torch.stack(found).nanmean(0)
    return means[0].tolist(), means[1].tolist()


def _with_tag(items: HintSet, number: int) -> list[int]:
    """Patches that carry a tag, those with the most other tags first: there heatmaps have something to avoid."""
    tags = items.tags
    assert tags is not None
    own = np.flatnonzero(tags[:, number])
    own = own[np.argsort(-tags[own].sum(1), kind="stable")]
    most = own[tags[own].sum(1) == tags[own].sum(1).max()] if len(own) else own
    pool = most if len(most) >= SHOWN else own
    return [int(pool[place]) for place in spread(len(pool), SHOWN)]


def _row(method: LPD, items: HintSet, place: int, number: int, channels: range) -> list[NDArray[np.uint8]]:
    batch = collate([items.sample(place)]).to(method.device)
    maps = method.explain(Batch(batch.ids, batch.images, tags=batch.tags))
    image = F.interpolate(batch.images, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True, align_corners=False)
    heats = [maps["class_maps"][0, number], *(maps["prototypes"][0, channel] for channel in channels)]
    return [picture(image[0]), *(picture(heat(each, THUMBNAIL)) for each in heats)]


def _told(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.2f}"


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
