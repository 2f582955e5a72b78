"""Tables of hints: what a CSV file says about images, and every place where it breaks a rule.

Reading never stops at the first problem: each function appends to a list of ``Problem`` and goes on, so that one
pass finds all of them. ``refuse`` turns such a list into the error of the first one.
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tissuehint.errors import InputError
from tissuehint.labels import PROPORTION_TOLERANCE, LabelSpace, Points, Proportions, Tags

Severity = Literal["error", "warning"]

TAG = "tag:"
PROPORTION = "proportion:"
TABLE_COLUMNS = ("image", "split", "group", "um_per_px")
POINT_COLUMNS = ("image", "row", "column", "class")
LARGEST_PIXEL = 2**31 - 1

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_PER_CENT_TOLERANCE = 1.0


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set.

    Args:
        file: file, relative to the folder that is checked.
        line: line in the file, from 1; None where lines have no meaning.
        subject: what is wrong, by name.
        rule: the rule that it breaks.
        fix: what to do.
        severity: ``error`` stops reading, ``warning`` does not.

    Example:
        >>> print(Problem("labels.csv", 7, "tag:gland of image 'a'", "is '2', tags are 0 or 1", "write 0 or 1"))
        labels.csv:7: tag:gland of image 'a' is '2', tags are 0 or 1; write 0 or 1
    """

    file: str
    line: int | None
    subject: str
    rule: str
    fix: str
    severity: Severity = "error"

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        mark = "warning: " if self.severity == "warning" else ""
        return " ".join(f"{place}: {mark}{self.subject} {self.rule}; {self.fix}".split())


@dataclass(frozen=True)
class Row:
    """One row of a table: its line in the file and its cells by column."""

    line: int
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A CSV file as text cells.

    Args:
        file: name for problems.
        columns: header, in order.
        rows: rows that have at least one cell.
        decimal_comma: numbers may be written 0,5 (the file is separated by semicolons or tabs).
    """

    file: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    decimal_comma: bool

    def classes(self, prefix: str) -> tuple[str, ...]:
        """Class names of the columns that start with ``prefix``, in order."""
        return tuple(column.removeprefix(prefix) for column in self.columns if column.startswith(prefix))

    def number(self, cell: str) -> float | None:
        """The number in a cell, None where it is none or is beyond floating point."""
        text = cell.replace(",", ".") if self.decimal_comma else cell
        number = float(text) if _NUMBER.fullmatch(text) else math.inf
        return number if math.isfinite(number) else None


@dataclass(frozen=True)
class LabelledPoint:
    """A point with the place where it is written."""

    file: str
    line: int | None
    subject: str
    row: int
    column: int
    label: int


def refuse(problems: Sequence[Problem], folder: Path | None = None, advice: str = "") -> None:
    """Raise the first error of a list of problems, warnings left aside.

    Args:
        problems: what was found.
        folder: put before the file names.
        advice: added where there are more errors, ``{count}`` is their number.

    Raises:
        InputError: there is an error.
    """
    errors = [problem for problem in problems if problem.severity == "error"]
    if not errors:
        return
    first = errors[0]
    place = str(folder / first.file) if folder is not None else first.file
    subject = place if first.line is None else f"{place}:{first.line}"
    more = advice.format(count=len(errors)) if len(errors) > 1 else ""
    raise InputError(subject, f"{first.subject} {first.rule}", first.fix + more)


def read_table(path: Path, file: str, problems: list[Problem]) -> Table | None:
    """A CSV file, separated by commas, semicolons or tabs, in UTF-8 with or without byte-order mark.

    Args:
        path: file to read.
        file: its name in problems.
        problems: what is wrong is added here.

    Returns:
        The table; None where there is no header to go by.
    """
    text = _text(path, file, problems)
    if text is None:
        return None
    delimiter = _delimiter(text)
    lines = _lines(text, delimiter, file, problems)
    header = next(lines, None)
    if header is None:
        problems.append(Problem(file, None, "table", "is empty", "write a header line with a column 'image'"))
        return None
    columns = [_column_name(cell) for cell in header[1]]
    while columns and not columns[-1]:  # spreadsheets leave empty columns on the right
        columns.pop()
    _check_header(columns, header[0], file, problems)
    rows = [_row(line, cells, columns, file, problems) for line, cells in lines]
    return Table(file, tuple(columns), tuple(rows), decimal_comma=delimiter != ",")


def check_columns(table: Table, required: Sequence[str], known: Collection[str], problems: list[Problem]) -> None:
    """Add a problem for every required column that is missing and every column that is not known."""
    for name in required:
        if name not in table.columns:
            found = ", ".join(table.columns) or "none"
            rule = f"is missing (columns: {found})"
            problems.append(Problem(table.file, 1, f"column '{name}'", rule, f"add a column '{name}'"))
    for column in dict.fromkeys(table.columns):
        if column and column not in known:
            close = difflib.get_close_matches(column.lower(), known, 1, 0.7)
            fix = f"did you mean '{close[0]}'?" if close else f"remove it, or use one of {', '.join(known)}"
            problems.append(Problem(table.file, 1, f"column '{column}'", "is unknown", fix))


def check_label_columns(table: Table, labels: LabelSpace, problems: list[Problem]) -> None:
    """Check the header of a table of tags and proportions: known columns only, and a hint for all classes or none."""
    hints = [prefix + name for prefix in (TAG, PROPORTION) for name in labels.tissue]
    white = labels.names[labels.white] if labels.white is not None else None
    known = [*TABLE_COLUMNS, *hints]
    for prefix in (TAG, PROPORTION):
        if white is not None and prefix + white in table.columns:
            rule = "names the white class, which has no tags or proportions"
            problems.append(Problem(table.file, 1, f"column '{prefix}{white}'", rule, "remove the column"))
            known.append(prefix + white)
    required = ["image"]
    for prefix in (TAG, PROPORTION):
        if table.classes(prefix):
            required += [prefix + name for name in labels.tissue]
    check_columns(table, required, known, problems)


def tags_of(row: Row, table: Table, labels: LabelSpace, problems: list[Problem]) -> Tags | None:
    """Tags of one row; None where its tag cells are empty or broken."""
    values = []
    for subject, cell in _hint_cells(row, table, TAG, labels):
        number = table.number(cell)
        if number not in (0, 1):
            rule = f"is '{cell}', tags are 0 or 1" if cell else "is empty while others of the image are not"
            problems.append(Problem(table.file, row.line, subject, rule, "write 1 for present, 0 for absent"))
            continue
        values.append(int(number))
    return Tags(values) if len(values) == labels.num_tissue else None


def proportions_of(row: Row, table: Table, labels: LabelSpace, problems: list[Problem]) -> Proportions | None:
    """Proportions of one row; None where its proportion cells are empty or broken."""
    cells = _hint_cells(row, table, PROPORTION, labels)
    numbers = [table.number(cell) for _, cell in cells]
    values = [number for number in numbers if number is not None]
    complete = len(values) == labels.num_tissue
    owner = f"proportions of image '{row.cells.get('image', '')}'"
    if complete and max(values) > 1 and min(values) >= 0 and abs(sum(values) - 100) <= _PER_CENT_TOLERANCE:
        rule = f"sum to {sum(values):.4g}, not 1: they look like per cent"
        problems.append(Problem(table.file, row.line, owner, rule, "divide by 100"))
        return None
    broken = False
    for (subject, cell), number in zip(cells, numbers, strict=True):
        if number is None or not 0 <= number <= 1:
            broken = True
            rule = f"is '{cell}', proportions are numbers in [0, 1]" if cell else "is empty while others are not"
            problems.append(Problem(table.file, row.line, subject, rule, "write a fraction such as 0.3"))
    if broken or not complete:
        return None
    if abs(sum(values) - 1) > PROPORTION_TOLERANCE:
        rule = f"sum to {sum(values):.4g}, not 1 (within {PROPORTION_TOLERANCE})"
        problems.append(Problem(table.file, row.line, owner, rule, "make the fractions of an image sum to 1"))
        return None
    return Proportions(values)


def points_of(table: Table, labels: LabelSpace, problems: list[Problem]) -> dict[str, list[LabelledPoint]]:
    """Points of a point table by the image as it is written there."""
    check_columns(table, POINT_COLUMNS, POINT_COLUMNS, problems)
    found: dict[str, list[LabelledPoint]] = {}
    for row in table.rows:
        image = image_of(row, table, problems)
        place = [_pixel(row, table, axis, problems) for axis in ("row", "column") if axis in table.columns]
        label = _label(row, table, labels, problems) if "class" in table.columns else None
        pixel = [axis for axis in place if axis is not None]
        if image is None or label is None or len(pixel) != 2:
            continue
        subject = f"point (row {pixel[0]}, column {pixel[1]}) of image '{image}'"
        point = LabelledPoint(table.file, row.line, subject, pixel[0], pixel[1], label)
        found.setdefault(image, []).append(point)
    return found


def check_points(
    points: Sequence[LabelledPoint], size: tuple[int, int] | None, labels: LabelSpace, problems: list[Problem]
) -> None:
    """Add a problem for points outside an image of (height, width) and for pixels that are labelled twice."""
    seen: dict[tuple[int, int], int] = {}
    for point in points:
        if size is not None and (point.row >= size[0] or point.column >= size[1]):
            rule = f"lies outside the image of {size[0]} x {size[1]} pixels (height x width)"
            fix = "give rows and columns inside the image, counted from 0"
            problems.append(Problem(point.file, point.line, point.subject, rule, fix))
        first = seen.setdefault((point.row, point.column), point.label)
        if first != point.label:
            rule = f"is {labels.names[point.label]} here and {labels.names[first]} before"
            problems.append(Problem(point.file, point.line, point.subject, rule, "keep one class per pixel"))


def as_points(points: Sequence[LabelledPoint]) -> Points:
    """Points without the places where they were written."""
    return Points([(point.row, point.column, point.label) for point in points])


def image_of(row: Row, table: Table, problems: list[Problem]) -> str | None:
    """Image of a row, with forward slashes; None where the cell is missing or empty."""
    if "image" not in table.columns:
        return None
    image = row.cells["image"].replace("\\", "/")
    if not image:
        problems.append(Problem(table.file, row.line, "column 'image'", "is empty", "name the image of this row"))
    return image or None


def _hint_cells(row: Row, table: Table, prefix: str, labels: LabelSpace) -> list[tuple[str, str]]:
    """(subject, cell) of the columns of one hint in class order; nothing where all cells are empty."""
    names = [name for name in labels.tissue if prefix + name in table.columns]
    image = row.cells.get("image", "")
    cells = [(f"{prefix}{name} of image '{image}'", row.cells[prefix + name]) for name in names]
    return cells if any(cell for _, cell in cells) else []


def _pixel(row: Row, table: Table, axis: str, problems: list[Problem]) -> int | None:
    cell = row.cells[axis]
    number = table.number(cell)
    if number is None or not 0 <= number <= LARGEST_PIXEL or number != int(number):
        rule = f"is '{cell}', {axis}s are whole pixels from 0"
        problems.append(Problem(table.file, row.line, f"{axis} of a point", rule, "round down to a whole number"))
        return None
    return int(number)


def _label(row: Row, table: Table, labels: LabelSpace, problems: list[Problem]) -> int | None:
    cell = row.cells["class"]
    if cell in labels.names:
        return labels.names.index(cell)
    if cell.isdecimal() and len(cell) <= 3 and int(cell) < labels.num_classes:
        return int(cell)
    rule = f"is '{cell}', classes are {', '.join(labels.names)} or 0..{labels.num_classes - 1}"
    problems.append(Problem(table.file, row.line, "class of a point", rule, "use one of these names or its index"))
    return None


def _text(path: Path, file: str, problems: list[Problem]) -> str | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        problems.append(Problem(file, None, "table", "does not exist", "check the path"))
        return None
    except OSError as error:
        problems.append(Problem(file, None, "table", f"cannot be read ({error.strerror})", "check the file"))
        return None
    fix = "save it as 'CSV UTF-8'"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        problems.append(Problem(file, 1, "table", "is UTF-16, tables are UTF-8", fix))
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    bad = next(number for number, line in enumerate(content.split(b"\n"), 1) if not _is_utf8(line))
    problems.append(Problem(file, bad, "line", "has bytes that are not UTF-8", fix))
    return content.decode("cp1252", errors="replace")  # only to find the other problems


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _delimiter(text: str) -> str:
    first = next((line for line in text.splitlines() if line.strip()), "")
    for mark in ",;\t":  # names of classes may hold many of the others
        if (next(csv.reader([first], delimiter=mark), None) or [""])[0].strip().lower() == "image":
            return mark
    return max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))


def _lines(text: str, delimiter: str, file: str, problems: list[Problem]) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row that is not blank; the line is that where the row starts."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = "put quotes in pairs, and save as CSV"
            problems.append(Problem(file, line, "line", f"is broken ({error})", fix))
            return
        if any(cell.strip() for cell in cells):
            yield line, cells


def _column_name(cell: str) -> str:
    name = cell.strip()
    for prefix in (TAG, PROPORTION):
        if name.startswith(prefix):
            return prefix + name.removeprefix(prefix).strip()
    return name


def _check_header(columns: list[str], line: int, file: str, problems: list[Problem]) -> None:
    for name in dict.fromkeys(columns):
        if not name:
            problems.append(Problem(file, line, "header", "has a column without a name", "name or remove it"))
        elif columns.count(name) > 1:
            problems.append(Problem(file, line, f"column '{name}'", "stands there twice", "remove one of them"))


def _row(line: int, cells: list[str], columns: list[str], file: str, problems: list[Problem]) -> Row:
    cells = [cell.strip() for cell in cells]
    extra = any(cells[len(columns) :])
    if extra or len(cells) < len(columns):
        rule = f"has {len(cells)} cells for {len(columns)} columns"
        problems.append(Problem(file, line, "line", rule, "give every column one cell, quote cells with separators"))
    cells += [""] * (len(columns) - len(cells))
    return Row(line, dict(zip(columns, cells, strict=False)))
