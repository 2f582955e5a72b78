"""Pictures for the report: image, truth, tissue map, pseudo mask, prediction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tissuehint.files import atomic_path, write_json, write_palette_png
from tissuehint.labels import LabelSpace

INDEX = "index.json"
SHOWN_HEATS = 3  # of the maps that a method explains one image with, of each kind


def blend(tissue_map: Tensor, labels: LabelSpace) -> NDArray[np.uint8]:
    """RGB picture (H,W,3) of a tissue map: class colours mixed by probability."""
    colours = labels.colour_table()[: labels.num_classes].astype(np.float32)
    shares = tissue_map.float().cpu().numpy().transpose(1, 2, 0)
    return np.asarray(np.clip(shares @ colours + 0.5, 0, 255), np.uint8)


class Gallery:
    """Writes layers of images, then the index that the report reads.

    Args:
        folder: of the run directory.
        labels: classes and colours.
    """

    def __init__(self, folder: Path, labels: LabelSpace) -> None:
        self.folder = folder
        self.labels = labels
        self.items: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        split: str,
        image: NDArray[np.uint8],
        masks: Mapping[str, NDArray[np.uint8] | None],
        maps: Mapping[str, Tensor | None],
        heats: Mapping[str, Tensor],
        **facts: Any,
    ) -> None:
        """Write the layers of one image.

        Args:
            name: record id.
            split: where it comes from.
            image: (H,W,3) uint8.
            masks: layer name to (H,W) class indices; None is left out.
            maps: layer name to (K,H,W) probabilities; None is left out.
            heats: layer name to (n,H,W) values in [0,1], of which the first few become grey layers.
            facts: numbers shown beside the image.
        """
        layers = {"image": f"{name}_image.jpg"}
        with atomic_path(self.folder / layers["image"]) as part:
            Image.fromarray(image).save(part, format="JPEG", quality=92)
        for layer, mask in masks.items():
            if mask is not None:
                layers[layer] = f"{name}_{layer}.png"
                write_palette_png(self.folder / layers[layer], mask, self.labels.palette())
        for layer, tissue_map in maps.items():
            if tissue_map is not None:
                layers[layer] = f"{name}_{layer}.png"
                with atomic_path(self.folder / layers[layer]) as part:
                    Image.fromarray(blend(tissue_map, self.labels)).save(part, format="PNG")
        for heat, values in heats.items():
            for number, value in enumerate(values[:SHOWN_HEATS], start=1):
                layer = f"{heat}_{number}" if len(values) > 1 else heat
                layers[layer] = f"{name}_{layer}.png"
                grey = (value.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
                with atomic_path(self.folder / layers[layer]) as part:
                    Image.fromarray(grey).save(part, format="PNG")
        self.items.append({"id": name, "split": split, "layers": layers, **facts})

    def finish(self) -> None:
        """Write the index."""
        write_json(self.folder / INDEX, {"items": self.items})
