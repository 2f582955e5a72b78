"""Pictures of the energies of some images: which terms speak where, and how the energy falls along the flow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tissuehint.data.module import TissueData
from tissuehint.data.samples import collate
from tissuehint.files import atomic_path, write_json
from tissuehint.methods.sheets import heat, picture, sheet, spread

if TYPE_CHECKING:
    from tissuehint.methods.vslp.method import VSLP

SHOWN = 4  # images
THUMBNAIL = 168  # their side in pixels
GAP = 4
ENERGIES = ("fidelity_energy", "regularisation_energy", "proportion_energy")
FILE, NUMBERS, PICTURES = "energies.png", "energies.json", "pictures.json"


def write_pictures(method: VSLP, data: TissueData, folder: Path) -> None:
    """A sheet with one row an image: the image, its maps and its energies; energies along the flow as numbers.

    Images are those of val, or of train where there is no val.
    """
    split = "val" if data.records("val") else "train"
    items = data.hints(split, method.supervision)
    places = spread(len(items), SHOWN)
    rows: list[list[NDArray[np.uint8]]] = []
    flows: dict[str, list[float]] = {}
    shown: list[str] = []
    for place in places:
        batch = collate([items.sample(place)]).to(method.device)
        maps = method.explain(batch)
        image = F.interpolate(batch.images, (THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)[0]
        energies = [name for name in ENERGIES if name in maps]
        shown = ["the image", "classes of the views' average", "classes of the map", "disagreement of the views"]
        shown += [name.replace("_", " ") for name in energies]
        final = maps["guided_map" if "guided_map" in maps else "soft_map"]
        row = [picture(image), _classes(maps["confidence"][0], method), _classes(final[0], method)]
        row += [picture(heat(maps[name][0, 0], THUMBNAIL)) for name in ("disagreement", *energies)]
        rows.append(row)
        seen = method.see(batch.images)
        flow = method.fuse(batch.images, batch.proportions, seen)
        flat = float(method.energy(batch.images, seen).guide_energy(flow.u).sum().detach())
        flows[batch.ids[0]] = [round(float(value) - flat, 3) for value in flow.energies[:, 0]]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / FILE) as part:
        Image.fromarray(sheet(rows, GAP)).save(part, format="PNG")
    write_json(folder / NUMBERS, {"split": split, "energies": flows})
    falls = "; ".join(f"{name}: {energies[0]:.1f} to {energies[-1]:.1f}" for name, energies in flows.items())
    text = (
        f"Images of {split} with their proportions. From left to right: {', '.join(shown)} (bright: high, each from "
        "its smallest to its largest value). The fidelity is high where the map leaves the views, the regularisation "
        "where the map is less likely than a flat one, the proportion energy where a class has more area than given."
    )
    caption = f"Energy along the flow, start to end, less that of a flat map's regularisation. {falls}"
    pictures = [{"file": FILE, "caption": caption}]
    write_json(folder / PICTURES, {"title": "Energies", "text": text, "pictures": pictures})


def _classes(maps: Tensor, method: VSLP) -> NDArray[np.uint8]:
    """The likeliest class of (C,h,w) in its colour, (t,t,3)."""
    grown = F.interpolate(maps[None], (THUMBNAIL, THUMBNAIL), mode="bilinear", align_corners=False)[0]
    return np.asarray(method.labels.colour_table()[grown.argmax(0).cpu().numpy()])
