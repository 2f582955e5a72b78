"""Tiny copies of official layouts, written the way their releases are: same names, folders, modes and codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 8


def write_image(path: Path, side: int = SIDE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), 200, np.uint8)).save(path)
    return path


def write_mask(path: Path, codes: list[int], mode: str = "L", side: int = SIDE) -> Path:
    """Rows of equal width, one code each, from the top; the last code fills the rest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [codes[min(row, len(codes) - 1)] for row in range(side)]
    array = np.repeat(np.array(rows, np.uint8)[:, None], side, axis=1)
    picture = Image.fromarray(array)
    if mode == "P":
        picture.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    elif mode == "1":
        picture = Image.fromarray(array.astype(bool))
    picture.save(path)
    return path


def write_junk(*folders: Path) -> None:
    """What file managers leave behind."""
    for folder in folders:
        for name in ("Thumbs.db", ".DS_Store", "._hidden.png", "desktop.ini", "readme.txt"):
            (folder / name).write_bytes(b"junk")


def write_glas(root: Path, suffix: str = ".bmp", test_b: int = 2, table: bool = True) -> Path:
    names = [f"train_{number}" for number in (1, 2, 10, 70, 71, 85)] + ["testA_1", "testA_2"]
    names += [f"testB_{number}" for number in range(1, test_b + 1)]
    for name in names:
        write_image(root / f"{name}{suffix}")
        write_mask(root / f"{name}_anno.bmp", [0, 1, 17])
    if table:
        patients = {"train_71": 1, "testA_1": 1}
        rows = [
            f"{name},{patients.get(name, index + 2)}, {'benign' if index % 2 else 'malignant'}, adenomatous "
            for index, name in enumerate(names)
        ]
        header = "name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"
        (root / "Grade.csv").write_text("\r\n".join([header, *rows, ""]))
    write_junk(root)
    return root


def write_ebhi(root: Path, table: bool = True, cases: int = 10) -> Path:
    rows = ["class,file,case,split"]
    for folder in ("Low-grade IN", "Polyp", "Normal"):
        for number in range(cases):
            case = f"GT{folder[0]}2000{number:03d}"
            for image in (1, 2):
                name = f"{case}-1-400-{image:03d}"
                write_image(root / folder / "image" / f"{name}.png")
                write_mask(root / folder / "label" / f"{name}.png", [0, 90, 128, 255])
                rows.append(f"{folder},{name}.jpg,{case},{'val' if number >= 0.8 * cases else 'train'}")
        write_junk(root / folder / "image", root / folder / "label")
    if table:
        (root / "split_by_case.csv").write_text("\n".join([*rows, ""]))
    return root


def write_wsss4luad(root: Path, background: bool = True) -> Path:
    for stem in ("1003370-5631-18822-[0, 1, 0]", "436219-7159-48057-[1, 0, 0]", "436219-1-2-[0, 0, 0]"):
        write_image(root / "1.training" / f"{stem}.png")
    for folder, count in (("2.validation", 10), ("3.testing", 3)):
        for number in range(count):
            name = f"{number:02d}.png"
            write_image(root / folder / "img" / name)
            # normal (2) is in two regions only; white is left to the background mask, as in row 0
            write_mask(root / folder / "mask" / name, [0, 0, 1, 2 if number in (0, 5) else 1, 3], "P")
            if background:
                write_mask(root / folder / "background-mask" / name, [1, 0, 0, 0, 1], "P")
        write_junk(root / folder / "img")
    write_junk(root / "1.training")
    return root


def write_patches(
    root: Path,
    train: list[str],
    stems: list[str],
    codes: list[int],
    *,
    val: str = "val",
    train_folder: str = "train",
    suffix: str = ".png",
) -> Path:
    for stem in train:
        write_image(root / train_folder / f"{stem}{suffix}")
    for folder in (val, "test"):
        for stem in stems:
            write_image(root / folder / "img" / f"{stem}{suffix}")
            write_mask(root / folder / "mask" / f"{stem}.png", codes, "P")
        write_junk(root / folder / "img", root / folder / "mask")
    write_junk(root / train_folder)
    return root


def write_bcss(root: Path, images: str = "rgbs_colorNormalized") -> Path:
    sites = ["OL-A5D6", "S3-AA10"] + [f"A1-A0S{letter}" for letter in "ABCDEFGHIJ"]
    for index, site in enumerate(sites):
        stem = f"TCGA-{site}-DX1_xmin{index}_ymin5_MPP-0.2500"
        write_image(root / images / f"{stem}.png", side=24)
        write_mask(root / "masks" / f"{stem}.png", list(range(22)), side=24)
    write_junk(root / images, root / "masks")
    return root


def write_camelyon16(root: Path, slides: int = 8) -> Path:
    for slide in range(slides):
        for corner in (0, 4096):
            stem = f"tumor_{slide:03d}_{corner}_128"
            write_image(root / "images" / f"{stem}.png", side=16)
            write_mask(root / "masks" / f"{stem}.png", [0, 255], side=4)
            (root / "points").mkdir(exist_ok=True)
            points = {"pos": [[2, 3], [3, 0]], "neg": [[0, 1]]}
            (root / "points" / f"{stem}.json").write_text(json.dumps(points))
    write_junk(root / "images", root / "masks", root / "points")
    return root
