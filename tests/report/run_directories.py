"""A made-up run directory, as the pipeline writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tissuehint.files import write_palette_png
from tissuehint.labels import LabelSpace

LABELS = LabelSpace(("gland", "stroma", "lymphocytes", "necrosis", "white"), white=4)
RECIPE = """\
name: phantom-cam
seed: 0
data:
  source: phantom
method:
  name: cam
stage1: {steps: 400}
stage2: {steps: 300}
"""


def score_row(stage: str, miou: float | None, **changes: Any) -> dict[str, Any]:
    base = miou or 0.0
    classes = {"gland": base + 0.1, "stroma": base, "lymphocytes": base - 0.1, "necrosis": None}
    row = {
        "stage": stage,
        "name": "cam",
        "split": "test",
        "gate": "predicted",
        "protocol": "ignore_white",
        "miou": miou,
        "fwiou": base + 0.02,
        "dice_mean": base + 0.1,
        "dice_from_miou": 2 * base / (1 + base),
        "accuracy": base + 0.15,
        "iou": classes,
        "boundary_miou": base / 2,
        "boundary_iou": {name: value and value / 2 for name, value in classes.items()},
        "boundary_distance": 6,
        "images": 60,
    }
    return row | changes


def scores() -> dict[str, Any]:
    rows = [
        score_row("tags_only", 0.21, name="majority"),
        score_row("stage1", 0.55),
        score_row("stage1", 0.62, gate="oracle"),
        score_row("pseudo_masks", 0.64, gate="oracle", split="train"),
        score_row("stage2", 0.68, split="val", gate="none", name="unet"),
        score_row("stage2", 0.66, gate="none", name="unet"),
        score_row("stage2", 0.59, gate="none", name="unet", protocol="fp_on_white"),
        score_row("ceiling", 0.71, gate="none", name="unet"),
    ]
    return {"format": 1, "labels": LABELS.to_dict(), "rows": rows, "weak_full_ratio": {"miou": 0.93, "dice_mean": 0.95}}


def write_metrics(path: Path, steps: int, seed: int, columns: tuple[str, str] = ("train_loss", "val_miou")) -> None:
    rng = np.random.default_rng(seed)
    lines = [f"epoch,step,{columns[0]},val_loss,{columns[1]},lr"]
    for step in range(0, steps, 10):
        loss = np.exp(-step / (steps / 3)) + 0.3 + 0.05 * rng.standard_normal()
        lines.append(f"{step // 100},{step},{loss:.5f},,,0.001")
        if step % 50 == 0 and step:
            lines.append(f"{step // 100},{step},,{loss + 0.1:.5f},{0.75 - loss / 2:.5f},")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tissue(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of random blobs with the colours of H&E, and its classes."""
    grid = np.asarray(Image.fromarray(rng.random((6, 6)).astype(np.float32)).resize((width, height), 3))
    mask = np.digitize(grid, [0.3, 0.5, 0.7, 0.85]).astype(np.uint8)
    dyes = np.array([[150, 90, 160], [230, 160, 190], [90, 70, 140], [200, 140, 150], [243, 240, 243]])
    image = dyes[mask] + rng.normal(0, 14, (height, width, 1)) + rng.normal(0, 4, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8), mask


def write_item(folder: Path, identifier: str, seed: int, height: int = 64, width: int = 80) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    image, mask = tissue(rng, height, width)
    Image.fromarray(image).save(folder / f"{seed}_image.jpg", quality=90)
    truth = mask.copy()
    truth[: height // 8, : width // 4] = 255
    write_palette_png(folder / f"{seed}_truth.png", truth, LABELS.palette())
    write_palette_png(folder / f"{seed}_pseudo_mask.png", np.roll(mask, 7, 1), LABELS.palette())
    write_palette_png(folder / f"{seed}_prediction.png", np.roll(mask, 3, 0), LABELS.palette())
    blended = LABELS.colour_table()[np.roll(mask, 5, 1)]
    soft = Image.fromarray(blended).resize((width // 8, height // 8), 4).resize((width, height), 2)
    soft.save(folder / f"{seed}_tissue_map.png")
    layers = {name: f"{seed}_{name}.png" for name in ("truth", "tissue_map", "pseudo_mask", "prediction")}
    layers = {"image": f"{seed}_image.jpg", **layers}
    return {"id": identifier, "split": "test", "layers": layers, "miou": round(0.9 - 0.05 * (seed % 9), 3)}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def build_run(folder: Path, items: int = 2, height: int = 64, width: int = 80) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    environment = {
        "tissuehint": "0.1.0",
        "python": "3.12.1",
        "torch": "2.15.0",
        "platform": "Linux x86_64",
        "device": "cpu",
        "commit": "0123abc",
        "seed": 0,
        "command": "tissuehint run recipes/cam/phantom.yaml",
        "started": "2025-01-02T03:04:05+00:00",
        "packages": {"numpy": "2.4.6", "timm": "1.0.31"},
        "notes": ["Synthetic tissue, no patient data.", "Test split: 60 images, seed 7."],
    }
    write_json(folder / "environment.json", environment)
    write_metrics(folder / "stage1" / "metrics.csv", 400, 1)
    write_metrics(folder / "stage2" / "metrics.csv", 300, 2)
    for stage, seconds in (("stage1", 72.4), ("pseudo_masks", 8.1), ("stage2", 61), ("ceiling", 3720)):
        write_json(folder / stage / "done.json", {"seconds": seconds, "steps": 400})
    write_json(folder / "scores.json", scores())
    write_json(folder / "model" / "model.json", {"format": 1})
    index = [write_item(folder / "gallery", f"patch_{seed:03d}", seed, height, width) for seed in range(items)]
    write_json(folder / "gallery" / "index.json", {"items": index})
    return folder
