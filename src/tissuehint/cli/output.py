"""How results look in a terminal, and in a file that a terminal's output goes to."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# without a terminal there is no width to fit: tables go to files and other programs whole
WIDTH_OF_FILES = 200


def console() -> Console:
    """Where results are printed: stdout."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_FILES
    return Console(highlight=False, width=width)


def say(line: str = "") -> None:
    """Print a line as it is, never wrapped: paths stay whole."""
    print(line)


def note(line: str) -> None:
    """Print a line that is no result: on stderr."""
    print(line, file=sys.stderr)


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0, wrap: int = 0) -> None:
    """Print a table.

    Args:
        title: above it.
        heads: names of the columns.
        rows: cells.
        numbers: how many columns, counted from the right, hold numbers.
        wrap: how many columns, counted from the right, may be broken into lines; the others never are.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, head in enumerate(heads):
        right, breaks = index >= len(heads) - numbers, index >= len(heads) - wrap
        drawn.add_column(Text(head), justify="right" if right else "left", no_wrap=not breaks, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    page = console()
    if not wrap:
        # numbers stay readable in a narrow terminal, which breaks the lines itself
        page.width = max(page.width, page.measure(drawn).maximum)
    with page.capture() as captured:
        page.print(drawn)
    if title:
        say(title)
    # lines are padded to the width of the terminal: nothing that a file should hold
    for line in captured.get().strip("\n").splitlines():
        if line.strip():
            say(line.rstrip())
    say()


def decimal(value: Any, digits: int = 3) -> str:
    """Fixed decimals; ``-`` where there is no number.

    Example:
        >>> decimal(0.12345), decimal(float("nan")), decimal(None)
        ('0.123', '-', '-')
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}"
