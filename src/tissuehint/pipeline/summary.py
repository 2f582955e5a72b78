"""Score tables of several runs of one recipe (folds, seeds) as one table of means and spreads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tissuehint.metrics import mean_std

Row = Mapping[str, Any]

# rows of two runs are the same row if they agree in these
ROW_KEYS = ("stage", "gate", "split", "protocol", "name")
# what a row says beside its scores: how much was scored, and how
COUNTS = ("images", "pixels")
BAND = "boundary_distance"


def mean_rows(tables: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over runs, of every score of every row.

    Args:
        tables: rows of ``scores.json`` of each run.

    Returns:
        A row for each that any run has, in order of appearance. Each score, also one of a class, is
        ``{"mean", "std", "values"}``: values in the order of the runs, None where a run has no such row or the score
        is not defined in it; mean and std are over the others (NaN where none, or for std only one, is left).
        ``images`` and ``pixels`` are lists, one count a run.
    """
    keyed = [{tuple(str(row.get(key, "")) for key in ROW_KEYS): row for row in rows} for rows in tables]
    keys = dict.fromkeys(key for table in keyed for key in table)
    return [_mean_row([table.get(key) for table in keyed]) for key in keys]


def mean_ratio(ratios: Sequence[Row | None]) -> dict[str, Any] | None:
    """The same for the weak/full ratios of the runs; None where a run has none."""
    present = [ratio for ratio in ratios if ratio]
    return _mean_row(present) if present and len(present) == len(ratios) else None


def plain(summary: Any) -> Any:
    """A row, or all, with the mean in the place of each mean and spread; counts are summed.

    Example:
        >>> plain({"stage": "stage2", "miou": {"mean": 0.5, "std": 0.1, "values": [0.4, 0.6]}, "images": [3, 4]})
        {'stage': 'stage2', 'miou': 0.5, 'images': 7}
    """
    if not isinstance(summary, Mapping):
        return summary
    if is_spread(summary):
        return summary["mean"]
    return {key: sum(item or 0 for item in value) if key in COUNTS and isinstance(value, list) else plain(value)
            for key, value in summary.items()}  # fmt: skip


def is_spread(value: Any) -> bool:
    """Whether this is the mean and spread of a score."""
    return isinstance(value, Mapping) and {"mean", "std", "values"} <= value.keys()


def _mean_row(rows: Sequence[Row | None]) -> dict[str, Any]:
    keys = dict.fromkeys(key for row in rows if row is not None for key in row)
    combined: dict[str, Any] = {}
    for key in keys:
        values = [None if row is None else row.get(key) for row in rows]
        known = [value for value in values if value is not None]
        if key in COUNTS:
            combined[key] = values
        elif key == BAND:
            different = list(dict.fromkeys(known))
            combined[key] = different[0] if len(different) == 1 else " or ".join(map(str, different))
        elif known and all(isinstance(value, str) for value in known):
            combined[key] = known[0]
        else:
            combined[key] = _spread(values)
    return combined


def _spread(values: Sequence[Any]) -> dict[str, Any]:
    """Of one score; of a mapping (class -> score) that of each of its scores."""
    names = dict.fromkeys(name for value in values if isinstance(value, Mapping) for name in value)
    if names:
        return {name: _spread([value.get(name) if isinstance(value, Mapping) else None for value in values])
                for name in names}  # fmt: skip
    scores = [value if isinstance(value, int | float) and math.isfinite(value) else None for value in values]
    defined = [score for score in scores if score is not None]
    mean, std = mean_std(defined) if defined else (math.nan, math.nan)
    return {"mean": mean, "std": std, "values": scores}
