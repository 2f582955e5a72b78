"""One self-contained page that shows what a run did; reads a run directory, nothing else."""

from __future__ import annotations

from tissuehint.report.html import write_report

__all__ = ["write_report"]
