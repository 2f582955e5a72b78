"""Weak labels: simulated from masks, read from CSV tables and from QuPath exports.

Simulation answers "what would a pathologist have written?" for images whose mask is known: tags (what occurs),
points (a few clicks well inside a region) and proportions (how much of the tissue is what). It is the one place in
tissuehint that looks at a mask to make a training signal.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tissuehint.data.qupath import points_from_geojson
from tissuehint.data.tables import (
    PROPORTION,
    TAG,
    Problem,
    Row,
    Table,
    as_points,
    check_label_columns,
    check_points,
    image_of,
    points_of,
    proportions_of,
    read_table,
    refuse,
    tags_of,
)
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points, Proportions, Tags

__all__ = [
    "estimated_shares",
    "image_seed",
    "points_from_geojson",
    "points_from_mask",
    "proportions_from_mask",
    "read_point_table",
    "read_proportion_table",
    "read_tag_table",
    "tags_from_mask",
]

DEFAULT_EROSION = 3


def image_seed(seed: int, image_id: str) -> int:
    """A seed for one image, the same whatever the order or number of images around it.

    Args:
        seed: seed of the data set.
        image_id: ``Record.id``.

    Returns:
        An integer in 0..2^32 - 1.
    """
    return int(np.random.SeedSequence([seed, zlib.crc32(image_id.encode())]).generate_state(1)[0])


def tags_from_mask(mask: NDArray[np.uint8], labels: LabelSpace, threshold: float = 0.0) -> Tags:
    """Which tissue classes cover more than a share of the image.

    Class c is present where n_c / N > threshold, with n_c its pixels and N all pixels that are not ignored: white
    is never tagged but counts in N, as in the 5 % rule of OEEM for GlaS patches. With threshold 0 one pixel is enough.
    A mask of ignored pixels only has no class.

    Args:
        mask: (H,W) class indices, ``labels.ignore`` where unlabelled.
        labels: the classes.
        threshold: share of the image area in [0,1).

    Returns:
        Tags of length ``labels.num_tissue``.

    Raises:
        InputError: a mask value that is no class, a threshold outside [0,1).

    Example:
        >>> mask = np.array([[0, 0, 0, 1]], np.uint8)
        >>> space = LabelSpace(("gland", "stroma"))
        >>> tags_from_mask(mask, space).values, tags_from_mask(mask, space, 0.25).values
        (array([1, 1], dtype=uint8), array([1, 0], dtype=uint8))
    """
    if not 0 <= threshold < 1:
        raise InputError(f"tag threshold {threshold}", "is a share of the image area in [0, 1)", "write 0.05 for 5 %")
    counts = _class_counts(mask, labels)
    # a quotient, not count > threshold * total: 0.29 * 100 is below 29 in floating point
    return Tags(counts[: labels.num_tissue] / max(counts.sum(), 1) > threshold)


def points_from_mask(
    mask: NDArray[np.uint8],
    labels: LabelSpace,
    per_class: int,
    *,
    seed: int,
    erosion: int = DEFAULT_EROSION,
    classes: Sequence[int | str] | None = None,
) -> Points:
    """Pixels drawn uniformly, without replacement, well inside the region of each class.

    The region of a class is eroded ``erosion`` times by a 3 x 3 square: a point keeps more than ``erosion`` px
    (chessboard distance) from the next pixel of another class or of ignore. The image border is no class border
    and does not erode. Where the eroded region has fewer than ``per_class`` pixels, the erosion is taken back px by
    px, down to none; where the class itself has fewer pixels, all of them are taken.

    Args:
        mask: (H,W) class indices, ``labels.ignore`` where unlabelled.
        labels: the classes.
        per_class: points per class, at least 1.
        seed: the same seed gives the same points; the points of a class don't depend on which others are asked for.
        erosion: px, 0 for none.
        classes: indices or names; None for all tissue classes. White is drawn only where it is asked for.

    Returns:
        Points, class by class; none for a class that does not occur.

    Raises:
        InputError: a mask value that is no class, fewer than one point per class, a negative erosion, an unknown class.

    Example:
        >>> mask = np.zeros((9, 9), np.uint8)
        >>> mask[:, 5:] = 1
        >>> points_from_mask(mask, LabelSpace(("gland", "stroma")), 2, seed=0).rows[:, 2]
        array([0, 0, 1, 1])
    """
    if per_class < 1:
        raise InputError(f"{per_class} points per class", "is less than one", "ask for at least 1 point per class")
    if erosion < 0:
        raise InputError(f"erosion {erosion} px", "is negative", "write 0 for no erosion")
    _class_counts(mask, labels)
    wanted = range(labels.num_tissue) if classes is None else [_class_index(name, labels) for name in classes]
    drawn = [_draw(mask == index, index, per_class, seed, erosion) for index in wanted]
    return Points(np.concatenate([np.zeros((0, 3), np.int64), *drawn]))


def proportions_from_mask(
    mask: NDArray[np.uint8],
    labels: LabelSpace,
    *,
    round_to: float | None = None,
    noise: float | None = None,
    seed: int = 0,
) -> Proportions:
    r"""Share of each tissue class in the tissue of a mask; white and ignored pixels are not counted.

    With p_c = n_c / sum_k n_k over tissue classes, the result is p itself, or
    * with ``noise`` s > 0 a draw from Dirichlet(p / s), the reader who estimates by eye. Its mean is p and its
      standard deviation sqrt(p_c (1 - p_c) s / (1 + s)), so larger is noisier: s = 0.01 moves a class of 50 % by
      5 percentage points. A class that is absent stays absent.
    * with ``round_to`` multiples of it that still sum to 1, by the method of the largest remainder (ties go to the
      lower class index). Noise comes first, as a reader rounds what was estimated.

    Args:
        mask: (H,W) class indices, ``labels.ignore`` where unlabelled.
        labels: the classes.
        round_to: step that divides 1, such as 0.05 or 0.1; None for no rounding.
        noise: s, None or 0 for none.
        seed: of the noise.

    Returns:
        Proportions of length ``labels.num_tissue``.

    Raises:
        InputError: no tissue in the mask, a mask value that is no class, a step that does not divide 1, negative noise.

    Example:
        >>> mask = np.array([[0, 0, 1, 2]], np.uint8)
        >>> proportions_from_mask(mask, LabelSpace(("gland", "stroma", "white"), white=2), round_to=0.1).values
        array([0.7, 0.3])
    """
    counts = _class_counts(mask, labels)[: labels.num_tissue]
    if not counts.any():
        raise InputError("mask", "has no pixel of a tissue class", "leave the proportions of this image out")
    return Proportions(estimated_shares(counts / counts.sum(), round_to=round_to, noise=noise, seed=seed))


def estimated_shares(
    shares: NDArray[np.float64], *, round_to: float | None = None, noise: float | None = None, seed: int = 0
) -> NDArray[np.float64]:
    """Exact shares (C,) as a reader would write them; see ``proportions_from_mask``.

    Raises:
        InputError: a step that does not divide 1, negative noise.
    """
    if noise:
        shares = _with_noise(shares, noise, seed)
    return shares if round_to is None else _rounded(shares, round_to)


def read_tag_table(path: Path, labels: LabelSpace) -> dict[str, Tags]:
    """Tags from a CSV table with the columns ``image`` and ``tag:<class>`` for every tissue class.

    Args:
        path: the table; ``labels.csv`` of a data folder is one.
        labels: the classes.

    Returns:
        Tags by image as written in the table; images whose tag cells are all empty are left out.

    Raises:
        InputError: the first rule that the table breaks, with file and line.
    """
    problems: list[Problem] = []
    table = _label_table(path, labels, TAG, problems)
    found = {image: tags_of(row, table, labels, problems) for image, row in _image_rows(table, problems)}
    refuse(problems)
    return {image: tags for image, tags in found.items() if tags is not None}


def read_proportion_table(path: Path, labels: LabelSpace) -> dict[str, Proportions]:
    """Proportions from a CSV table with the columns ``image`` and ``proportion:<class>`` for every tissue class.

    Args:
        path: the table; ``labels.csv`` of a data folder is one.
        labels: the classes.

    Returns:
        Proportions by image as written in the table; images whose proportion cells are all empty are left out.

    Raises:
        InputError: the first rule that the table breaks, with file and line.
    """
    problems: list[Problem] = []
    table = _label_table(path, labels, PROPORTION, problems)
    found = {image: proportions_of(row, table, labels, problems) for image, row in _image_rows(table, problems)}
    refuse(problems)
    return {image: proportions for image, proportions in found.items() if proportions is not None}


def read_point_table(path: Path, labels: LabelSpace) -> dict[str, Points]:
    """Points from a CSV table with the columns ``image``, ``row``, ``column``, ``class``, one point a row.

    Args:
        path: the table.
        labels: the classes; ``class`` is a name or an index.

    Returns:
        Points by image as written in the table, in the order of the table.

    Raises:
        InputError: the first rule that the table breaks, with file and line.
    """
    problems: list[Problem] = []
    table = read_table(path, str(path), problems)
    found = points_of(table, labels, problems) if table is not None else {}
    for points in found.values():
        check_points(points, None, labels, problems)
    refuse(problems)
    return {image: as_points(points) for image, points in found.items()}


def _class_counts(mask: NDArray[np.uint8], labels: LabelSpace) -> NDArray[np.int64]:
    """(C,) pixels of each class, white included and ignore left out; refuses what is no mask of these classes."""
    if mask.ndim != 2 or not np.issubdtype(mask.dtype, np.integer):
        rule = f"has shape {mask.shape} and type {mask.dtype}, masks are (height, width) integers"
        raise InputError("mask", rule, "give one class index per pixel")
    values, counts = np.unique(mask, return_counts=True)
    classes = (values >= 0) & (values < labels.num_classes)
    unknown = values[~classes & (values != labels.ignore)]
    if unknown.size:
        rule = f"has value {int(unknown[0])}, classes are 0..{labels.num_classes - 1} and {labels.ignore} is ignore"
        raise InputError("mask", rule, "write the index of a class, or the ignore value")
    full = np.zeros(labels.num_classes, np.int64)
    full[values[classes]] = counts[classes]
    return full


def _class_index(name: int | str, labels: LabelSpace) -> int:
    if isinstance(name, str):
        return labels.index(name)
    if not 0 <= name < labels.num_classes:
        raise InputError(f"class {name}", f"classes are 0..{labels.num_classes - 1}", "use a class of the label space")
    return int(name)


def _draw(region: NDArray[np.bool_], index: int, per_class: int, seed: int, erosion: int) -> NDArray[np.int64]:
    """(P,3) points of one class: as much erosion as leaves enough pixels, then a uniform choice."""
    pixels = np.flatnonzero(region)
    if erosion and pixels.size > per_class and pixels.size < region.size:
        from scipy.ndimage import distance_transform_cdt

        depth = distance_transform_cdt(region, metric="chessboard").reshape(-1)[pixels]
        # the depth that the per_class deepest pixels reach: eroding further would leave fewer
        reached = int(np.partition(depth, -per_class)[-per_class])
        pixels = pixels[depth > min(erosion, reached - 1)]
    # a generator per class, so that the choice of classes does not move the points of the others
    generator = np.random.default_rng([seed, index])
    chosen = np.sort(generator.choice(pixels, min(per_class, pixels.size), replace=False))
    rows, columns = np.divmod(chosen, region.shape[1])
    return np.stack([rows, columns, np.full_like(rows, index)], axis=1)


def _with_noise(shares: NDArray[np.float64], noise: float, seed: int) -> NDArray[np.float64]:
    if not (noise > 0 and np.isfinite(noise)):
        raise InputError(f"noise {noise}", "is not a positive number", "write 0.01 for about 5 percentage points")
    present = shares > 0
    drawn = np.zeros_like(shares)
    drawn[present] = np.random.default_rng(seed).dirichlet(shares[present] / noise)
    return drawn


def _rounded(shares: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Multiples of ``step`` summing to 1: floors, then one step more for the largest remainders."""
    steps = round(1 / step) if step > 0 else 0
    if steps < 1 or abs(steps * step - 1) > 1e-9:
        raise InputError(f"rounding to {step}", "is not a step that divides 1", "write 0.05 or 0.1")
    quotas = np.round(shares * steps, 9)  # 0.3 * 10 is 3, not a little less
    floors = np.floor(quotas)
    missing = round(steps - floors.sum())
    floors[np.argsort(floors - quotas, kind="stable")[:missing]] += 1
    return floors / steps


def _label_table(path: Path, labels: LabelSpace, prefix: str, problems: list[Problem]) -> Table:
    table = read_table(path, str(path), problems)
    if table is None:
        refuse(problems)
        raise AssertionError("a table that cannot be read has a problem")
    check_label_columns(table, labels, problems)
    if not table.classes(prefix):
        rule = "is missing: the table has no such column"
        fix = f"add a column for each of {', '.join(labels.tissue)}"
        problems.append(Problem(table.file, 1, f"column '{prefix}<class>'", rule, fix))
    return table


def _image_rows(table: Table, problems: list[Problem]) -> Iterator[tuple[str, Row]]:
    lines: dict[str, int] = {}
    for row in table.rows:
        image = image_of(row, table, problems)
        if image is None:
            continue
        if image in lines:
            rule = f"stands in line {lines[image]} already"
            problems.append(Problem(table.file, row.line, f"image '{image}'", rule, "keep one row per image"))
            continue
        lines[image] = row.line
        yield image, row
