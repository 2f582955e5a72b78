"""What a label means: the classes of a data set, and the three cheap hints.

Class order is a property of a data set and stands in its catalog file, never in a model. Everywhere inside
tissuehint a class is its index in one ``LabelSpace``: tissue classes first, then (where the data set has it) white.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tissuehint.errors import InputError

IGNORE = 255
PROPORTION_TOLERANCE = 1e-3

# Okabe-Ito, distinguishable with the common colour-vision deficiencies
DEFAULT_COLOURS = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (230, 159, 0),
    (204, 121, 167),
    (86, 180, 233),
    (240, 228, 66),
    (0, 0, 0),
)
WHITE_COLOUR = (255, 255, 255)

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a data set, in index order.

    Args:
        names: class names, tissue classes first; white last where there is one.
        colours: one (red, green, blue) in 0..255 per name; empty takes a palette that is safe for colour blindness.
        ignore: mask value of unlabelled pixels.
        white: index of the white (no tissue, background of the slide) class in ``names``: the last one, or None.
            White is never tagged and never in a mean over tissue classes.

    Raises:
        InputError: no names, a repeated name, a wrong number of colours, a white index that is not the last.

    Example:
        >>> space = LabelSpace(("gland", "stroma", "white"), white=2)
        >>> space.tissue, space.num_tissue, space.num_classes
        (('gland', 'stroma'), 2, 3)
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] = ()
    ignore: int = IGNORE
    white: int | None = None

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        object.__setattr__(self, "names", names)
        colours = tuple(self.colours) or _default_colours(len(names), self.white)
        object.__setattr__(self, "colours", tuple(tuple(int(part) for part in colour) for colour in colours))
        self._validate()

    def _validate(self) -> None:
        names, subject = self.names, f"label space {list(self.names)}"
        if not names or any(not name for name in names):
            raise InputError(subject, "needs at least one name and no empty ones", "name every class")
        if len(set(names)) < len(names):
            raise InputError(subject, "has a name twice", "give every class its own name")
        if self.ignore > IGNORE:
            raise InputError(subject, f"has ignore value {self.ignore}, masks are 0..255", "use 255")
        if len(names) > self.ignore:
            raise InputError(subject, f"has {len(names)} classes and ignore index {self.ignore}", "use fewer classes")
        if len(self.colours) != len(names):
            raise InputError(subject, f"has {len(self.colours)} colours for {len(names)} names", "give one each")
        if any(len(colour) != 3 or min(colour) < 0 or max(colour) > 255 for colour in self.colours):
            raise InputError(subject, "has a colour that is not three numbers in 0..255", "write [red, green, blue]")
        if self.white is not None and self.white != len(names) - 1:
            raise InputError(subject, f"says white is class {self.white}", "put white last and give its index")
        if not self.tissue:
            raise InputError(subject, "has no tissue class", "name at least one class beside white")

    @property
    def num_classes(self) -> int:
        """Number of classes, white included: the channels of a tissue map."""
        return len(self.names)

    @property
    def num_tissue(self) -> int:
        """Number of tissue classes: the length of tags and proportions."""
        return len(self.names) - (self.white is not None)

    @property
    def tissue(self) -> tuple[str, ...]:
        """Names of the tissue classes."""
        return self.names[: self.num_tissue]

    def index(self, name: str) -> int:
        """Index of a class by name.

        Raises:
            InputError: unknown name.
        """
        if name not in self.names:
            raise InputError(f"class '{name}'", f"is not one of {', '.join(self.names)}", "use one of these names")
        return self.names.index(name)

    def palette(self) -> list[int]:
        """768 numbers for a palette PNG: class colours, black for unused indices, grey (128) for ignore."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.names)] = self.colours
        table[self.ignore] = 128
        return [int(value) for value in table.reshape(-1)]

    def colour_table(self) -> NDArray[np.uint8]:
        """(256,3) uint8, so that ``table[mask]`` is an RGB picture."""
        return np.asarray(self.palette(), np.uint8).reshape(256, 3)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "names": list(self.names),
            "colours": [list(colour) for colour in self.colours],
            "ignore": self.ignore,
            "white": self.white,
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LabelSpace:
        """Inverse of ``to_dict``."""
        colours = tuple((int(red), int(green), int(blue)) for red, green, blue in value.get("colours", ()))
        return cls(tuple(value["names"]), colours, int(value.get("ignore", IGNORE)), value.get("white"))


@dataclass(frozen=True, eq=False)
class Tags:
    """Image tags: which tissue classes occur.

    Args:
        values: (C,) of 0 and 1, C = ``LabelSpace.num_tissue``.

    Raises:
        InputError: another shape, or a value that is not 0 or 1.

    Example:
        >>> Tags([1, 0, 1]).names(LabelSpace(("gland", "stroma", "necrosis")))
        ('gland', 'necrosis')
    """

    values: NDArray[np.uint8]

    def __init__(self, values: ArrayLike) -> None:
        array = np.asarray(values)
        if array.ndim != 1 or not np.isin(array, (0, 1)).all():
            raise InputError(f"tags {_short(array)}", "are one 0 or 1 per tissue class", "write 0 or 1")
        object.__setattr__(self, "values", array.astype(np.uint8))

    @classmethod
    def from_names(cls, names: Iterable[str], space: LabelSpace) -> Tags:
        """Tags with the named classes present.

        Raises:
            InputError: a name that is no tissue class.
        """
        present = {space.index(name) for name in names}
        if space.white in present:
            rule = f"is white, tags are {', '.join(space.tissue)}"
            raise InputError(f"tag '{space.names[-1]}'", rule, "leave it out")
        return cls([int(index in present) for index in range(space.num_tissue)])

    def names(self, space: LabelSpace) -> tuple[str, ...]:
        """Names of the present classes."""
        return tuple(name for name, value in zip(space.tissue, self.values, strict=True) if value)


@dataclass(frozen=True, eq=False)
class Points:
    """A few labelled pixels.

    Args:
        rows: (P,3) integers, one point a row: (row, column, class), pixels from the upper left corner of the image.

    Raises:
        InputError: another shape, a fraction, or a negative number.

    Example:
        >>> len(Points([(10, 20, 0), (30, 5, 1)]))
        2
    """

    rows: NDArray[np.int64]

    def __init__(self, rows: ArrayLike) -> None:
        array = np.asarray(rows)
        if array.size == 0:
            array = np.zeros((0, 3), np.int64)
        if array.ndim != 2 or array.shape[1] != 3:
            raise InputError(f"points of shape {array.shape}", "are rows of row, column, class", "give (P, 3) integers")
        whole = np.issubdtype(array.dtype, np.integer) or bool((array == np.round(array)).all())
        if not whole or not np.isfinite(array).all():
            raise InputError(f"points {_short(array)}", "are whole pixels", "round rows and columns")
        if (array < 0).any():
            raise InputError(f"points {_short(array)}", "have a negative number", "count pixels and classes from 0")
        object.__setattr__(self, "rows", array.astype(np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def check_inside(self, height: int, width: int, space: LabelSpace, subject: object = "points") -> None:
        """Raise ``InputError`` where a point lies outside the image or names an unknown class."""
        for row, column, label in self.rows:
            if row >= height or column >= width:
                rule = f"point (row {row}, column {column}) lies outside the image of {height} x {width} pixels"
                raise InputError(subject, rule, "give rows and columns inside the image")
            if label >= space.num_classes:
                rule = f"point (row {row}, column {column}) has class {label}, classes are 0..{space.num_classes - 1}"
                raise InputError(subject, rule, "use a class of the label space")


@dataclass(frozen=True, eq=False)
class Proportions:
    """Share of each tissue class in the tissue area of an image.

    Args:
        values: (C,) in [0,1] summing to 1 within 0.001, C = ``LabelSpace.num_tissue``. White is not counted.

    Raises:
        InputError: another shape, a value outside [0,1], a sum that is not 1.

    Example:
        >>> Proportions([0.6, 0.3, 0.1]).values.sum().round(6).item()
        1.0
    """

    values: NDArray[np.float64]

    def __init__(self, values: ArrayLike) -> None:
        array = np.asarray(values, np.float64)
        subject = f"proportions {_short(array)}"
        if array.ndim != 1 or not np.isfinite(array).all() or (array < 0).any() or (array > 1).any():
            raise InputError(subject, "are one number in [0,1] per tissue class", "write fractions, not per cent")
        if abs(array.sum() - 1) > PROPORTION_TOLERANCE:
            raise InputError(subject, f"sum to {array.sum():.4g}, not 1", "make the fractions of an image sum to 1")
        object.__setattr__(self, "values", array)


def _default_colours(count: int, white: int | None) -> tuple[Colour, ...]:
    """The built-in palette, then hues spread around the circle."""
    import colorsys

    tissue = list(DEFAULT_COLOURS[:count])
    for index in range(len(tissue), count):
        red, green, blue = colorsys.hsv_to_rgb((index * 0.618034) % 1, 0.65, 0.85)
        tissue.append((int(255 * red), int(255 * green), int(255 * blue)))
    if white is not None and 0 <= white < count:
        tissue[white] = WHITE_COLOUR
    return tuple(tissue)


def _short(array: NDArray[Any]) -> str:
    values: Sequence[Any] = array.tolist() if array.ndim else [array.item()]
    text = str(values)
    return text if len(text) <= 80 else text[:77] + "..."
