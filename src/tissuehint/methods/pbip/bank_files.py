"""The image bank on disk: prototypes, what they are made of, and pictures to look at."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tissuehint.data.patches import resize_image
from tissuehint.data.training_sets import HintSet
from tissuehint.errors import InputError
from tissuehint.files import atomic_path, write_json
from tissuehint.labels import LabelSpace
from tissuehint.methods.pbip.bank import Bank, BankConfig, build_bank, need_tags
from tissuehint.methods.sheets import picture, sheet
from tissuehint.nn.image_encoders import ImageEncoder

PROTOTYPES = "bank.safetensors"
CARD = "bank.json"
PICTURES = "pictures.json"
SHEET = "bank_{}.png"  # of each class
SHOWN = 12  # images of each sub-class in its picture
THUMBNAIL = 72  # their side in pixels
GAP = 4
FORMAT = 1


def load_or_build(
    folder: Path,
    items: HintSet,
    labels: LabelSpace,
    config: BankConfig,
    encoder: ImageEncoder,
    device: torch.device | str,
) -> Bank:
    """The bank of ``folder`` where it was made from the same inputs, else a new one that is written there.

    Args:
        folder: of the run directory; made where it is missing.
        items: training patches with tags.
        labels: the classes.
        config: of the bank.
        encoder: frozen.
        device: where to compute.

    Raises:
        InputError: as ``build_bank``; nothing is written then.
    """
    inputs = inputs_digest(items, labels, config, encoder)
    kept = read_bank(folder)
    if kept is not None and kept[1] == inputs:
        return kept[0]
    bank = build_bank(items, labels, config, encoder, device)
    write_bank(folder, bank, items, labels, inputs)
    return bank


def inputs_digest(items: HintSet, labels: LabelSpace, config: BankConfig, encoder: ImageEncoder) -> str:
    """SHA-256 of all that a bank is made from: patches with their tags, settings, classes, the encoder's weights.

    Of an image its id and the content of its file, or its pixels where it is in memory.
    """
    digest = hashlib.sha256()
    facts = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "encoder": encoder.fingerprint(),
        "labels": list(labels.names),
        "grid": None if items.grid is None else items.grid.model_dump(mode="json"),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for record in items.records:
        image: Any = record.image
        content = image.read_bytes() if isinstance(image, Path) else np.asarray(image).tobytes()
        told = hashlib.sha256(content).hexdigest()
        digest.update(f"{record.id}\0{told}\0".encode())
    for values in (items.owner, items.corners, need_tags(items)):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def read_bank(folder: Path) -> tuple[Bank, str] | None:
    """The bank of a folder and the digest of its inputs; None where there is none, or a part of one.

    Raises:
        InputError: files that cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    card, weights = folder / CARD, folder / PROTOTYPES
    if not (card.is_file() and weights.is_file()):
        return None
    try:
        found: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))
        vectors = load_file(str(weights))
        bank = Bank.from_dict(found["bank"], vectors["prototypes"], vectors["center"])
        numbers = {sum(bank.counts), len(bank.prototypes), len(bank.sub_classes)}
        if len(numbers) > 1:
            raise ValueError(f"{len(bank.prototypes)} prototypes of {len(bank.sub_classes)} sub-classes")
        return bank, str(found["inputs"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        rule = f"is damaged ({' '.join(str(error).split())[:100]})"
        raise InputError(card, rule, "delete the folder, and the bank is made anew") from None


def write_bank(folder: Path, bank: Bank, items: HintSet, labels: LabelSpace, inputs: str) -> None:
    """Write pictures and prototypes, and last the card, without which the rest does not count."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    pictures = []
    for name, text, pixels in bank_pictures(bank, items, labels):
        with atomic_path(folder / name) as part:
            Image.fromarray(pixels).save(part, format="PNG")
        pictures.append({"file": name, "caption": text})
    shown = {"title": "Image bank", "text": _text(bank), "pictures": pictures}
    write_json(folder / PICTURES, shown)
    with atomic_path(folder / PROTOTYPES) as part:
        vectors = {"prototypes": bank.prototypes.contiguous(), "center": bank.center.contiguous()}
        save_file(vectors, str(part))
    write_json(folder / CARD, {"format": FORMAT, "inputs": inputs, "bank": bank.to_dict()})


def bank_pictures(bank: Bank, items: HintSet, labels: LabelSpace) -> list[tuple[str, str, NDArray[np.uint8]]]:
    """A sheet for each class, one row a sub-class: file name, caption, (H,W,3) picture of the nearest images."""
    sheets, first = [], 0
    for number, (name, count) in enumerate(zip(labels.names, bank.counts, strict=False)):
        parts = bank.sub_classes[first : first + count]
        first += count
        rows = [[_thumbnail(items, place) for place in each.items[:SHOWN]] for each in parts]
        sizes = ", ".join(f"{each.number}: {each.members}" for each in parts)
        caption = f"{name}: {bank.candidates[number]} patches; sub-classes, largest first, by patches: {sizes}"
        sheets.append((SHEET.format(number), caption, sheet(rows, GAP)))
    return sheets


def sub_class_pictures(folder: Path, bank: Bank) -> Tensor | None:
    """(L,3,h,w) in [0,1]: the row of each sub-class in the pictures of a folder; None where they are lost."""
    rows, step = list[Tensor](), THUMBNAIL + GAP
    for number, count in enumerate(bank.counts):
        try:
            with Image.open(folder / SHEET.format(number)) as opened:
                shown = torch.from_numpy(np.array(opened.convert("RGB"))).permute(2, 0, 1) / 255
        except OSError:
            return None
        rows += [shown[:, place * step : place * step + THUMBNAIL] for place in range(count)]
    if any(row.shape[1] != THUMBNAIL for row in rows):
        return None
    width = max(row.shape[2] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[2]), value=1.0) for row in rows])


def _text(bank: Bank) -> str:
    used = max(len(each.images) for each in bank.sub_classes)
    told = (
        f"One row a sub-class. Its prototype is the mean feature of up to {used} patches; shown are the {SHOWN} "
        "nearest to the centre, the nearest first."
    )
    return " ".join([told, *bank.notes])


def _thumbnail(items: HintSet, place: int) -> NDArray[np.uint8]:
    image = items.sample(place).image
    side = min(image.shape[1:])
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    small: Tensor = resize_image(image[None, :, top : top + side, left : left + side], THUMBNAIL)[0]
    return picture(small)
