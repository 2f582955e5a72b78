"""``tissuehint report``: write the page of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Write the report of a run again.

    Prints the path of report.html.
    """
    from tissuehint.cli.output import say
    from tissuehint.report import write_report

    say(str(write_report(run)))
