"""What the catalog knows about a published data set, and the rules that all entries share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tissuehint.data.records import Record, TissueDataset
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Tags

SPLITS = ("train", "val", "test")

Splits = dict[str, tuple[Record, ...]]

_BITS = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class CatalogEntry:
    """A published data set: its classes in tissuehint's order, its splits, and how to read its official layout.

    Args:
        name: key in the catalog.
        title: full name.
        labels: its classes, tissue first, white last.
        splits: names of the split schemes; the first is the default.
        hints: the hints that the release itself carries (``tags``, ``points``); all others are derived from masks.
        licence: terms of use in one line.
        citation: authors, title, journal, year.
        layout: the files that are expected, one kind a line.
        reader: from the root folder and a scheme to the data set; use ``read``, which checks both.
        mean: red, green, blue means of the published training code, pixels in [0,1]; None where it has none.
        std: the same for standard deviations.
        um_per_px: nominal pixel size in micrometres, None where unknown.
        counts: images of each split as published, for the default scheme; empty where there is no official split.
        published: scores in [0,1] by system, under the names of ``tissuehint.metrics.scores``.
    """

    name: str
    title: str
    labels: LabelSpace
    splits: tuple[str, ...]
    hints: tuple[str, ...]
    licence: str
    citation: str
    layout: str
    reader: Callable[[Path, str], TissueDataset]
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    um_per_px: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def read(self, root: Path, scheme: str | None = None) -> TissueDataset:
        """The data set in ``root``, split by ``scheme`` (None: the first of ``splits``).

        Raises:
            InputError: unknown scheme, ``root`` is no folder, or a folder, file or label that the layout asks for
                is missing or malformed.
        """
        chosen = self.splits[0] if scheme is None else scheme
        if chosen not in self.splits:
            rule = f"has no split scheme '{chosen}', it has {', '.join(self.splits)}"
            raise InputError(f"data set '{self.name}'", rule, "use one of these")
        root = Path(root)
        if not root.is_dir():
            raise layout_error(root, "is no folder", self.layout)
        return self.reader(root, chosen)


def layout_error(path: Path, rule: str, layout: str) -> InputError:
    """An error about the files of a data set that says what is expected."""
    kinds = ", ".join(line.strip() for line in layout.strip().splitlines())
    return InputError(path, rule, f"check the path; expected layout: {kinds}")


def parse_bits(stem: str, count: int) -> tuple[int, ...]:
    """Image-level label in a file name: 0/1 in the last square brackets, with or without separators.

    Args:
        stem: file name, with or without suffix.
        count: how many bits the data set has.

    Returns:
        ``count`` values of 0 or 1, in the order of the file name.

    Raises:
        InputError: no brackets, something that is not 0 or 1, another number of bits.

    Example:
        >>> parse_bits("slide+0[1101]", 4), parse_bits("a-[1 0 0 1]", 4), parse_bits("b-[1, 0, 0]", 3)
        ((1, 1, 0, 1), (1, 0, 0, 1), (1, 0, 0))
    """
    groups = _BITS.findall(stem)
    example = f"name it like 'name[{'1' * count}]'"
    if not groups:
        raise InputError(stem, f"has no image-level label, {count} bits in square brackets, in its name", example)
    text = re.sub(r"[\s,]", "", groups[-1])
    if set(text) - {"0", "1"}:
        raise InputError(stem, f"has the label [{groups[-1]}], labels are made of 0 and 1", example)
    if len(text) != count:
        raise InputError(stem, f"has {len(text)} label bits [{groups[-1]}], this data set has {count}", example)
    return tuple(int(bit) for bit in text)


def tags_from_name(path: Path, order: tuple[int | None, ...], labels: LabelSpace) -> Tags:
    """Tags of a training patch from its file name.

    Args:
        path: image file.
        order: for each bit of the name, in its order, the class of ``labels`` that it stands for; None drops it.
        labels: the classes.

    Raises:
        InputError: as ``parse_bits``, naming the whole path.
    """
    try:
        bits = parse_bits(path.name, len(order))
    except InputError as error:
        raise InputError(path, error.rule, error.fix) from None
    values = [0] * labels.num_tissue
    for label, bit in zip(order, bits, strict=True):
        if label is not None:
            values[label] = bit
    return Tags(values)


def record_id(*parts: str) -> str:
    """An id that is safe as a file name on every system: letters, digits, plus, minus and underscore.

    Example:
        >>> record_id("train", "436219-7159-48057-[1, 0, 0]")
        'train_436219-7159-48057-_1_0_0'
    """
    return re.sub(r"[^A-Za-z0-9+-]+", "_", "_".join(parts)).strip("_")


def check_ids(splits: Splits) -> None:
    """Raise ``InputError`` where two images of a data set get the same id, on any file system.

    Ids are compared without case: pseudo masks are written under them, and two names that differ in case only are
    one file on macOS and Windows.
    """
    seen: dict[str, Record] = {}
    for record in (record for name in SPLITS for record in splits.get(name, ())):
        other = seen.setdefault(record.id.lower(), record)
        if other is not record:
            rule = f"gets the same id '{record.id}' as {_shown(other)}"
            raise InputError(_shown(record), rule, "remove one of the two, or rename it")


def make_dataset(
    name: str, labels: LabelSpace, splits: Splits, notes: Iterable[str], counts: Mapping[str, int] | None = None
) -> TissueDataset:
    """A data set with its ids checked, and notes on what is missing and on patients that are in several splits.

    Args:
        name: key in the catalog.
        labels: its classes.
        splits: records by split; a missing split is empty.
        notes: lines of the reader; they come first.
        counts: published number of images by split, for the note on incomplete copies.

    Raises:
        InputError: two images with the same id.
    """
    complete = {key: tuple(splits.get(key, ())) for key in SPLITS}
    check_ids(complete)
    lines = [*notes, *_count_notes(complete, counts or {}), *_overlap_notes(complete)]
    return TissueDataset(name, labels, complete, tuple(lines))


def _count_notes(splits: Splits, counts: Mapping[str, int]) -> list[str]:
    return [
        f"this copy has {len(splits[key])} of the {number} published {key} images"
        for key, number in counts.items()
        if len(splits[key]) != number
    ]


def _overlap_notes(splits: Splits) -> list[str]:
    """How many groups (patients, cases, slides) of a later split also occur in an earlier one."""
    notes = []
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        known = {record.group for record in splits[first] if record.group}
        images = Counter(record.group for record in splits[second] if record.group)
        shared = sorted(group for group in images if group in known)
        if shared:
            count = sum(images[group] for group in shared)
            notes.append(
                f"patients overlap: {len(shared)} of the {len(images)} patients or slides in {second}, with {count} of"
                f" its {len(splits[second])} images, are also in {first}"
            )
    return notes


def _shown(record: Record) -> str:
    return str(record.image) if isinstance(record.image, Path) else record.id
