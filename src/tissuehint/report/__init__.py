"""Pages that show what a run did, and the slides of a cohort; they read its directory, nothing else."""

from __future__ import annotations

from tissuehint.report.cohort import write_summary
from tissuehint.report.html import write_report

__all__ = ["write_report", "write_summary"]
