"""``tissuehint compare``: do two groups of runs differ by more than their spread?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

SEPARATOR = "--against"
MEASURES = (("miou", "mIoU"), ("dice_mean", "Dice"))


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="A... --against B...", help="Run directories of both groups, one run per seed."),
    ],
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers too.")] = None,
) -> None:
    """Compare two groups of runs.

    Mean +- sample standard deviation of each group, and Welch's t-test. Rows are compared only with the same stage,
    gate, split and protocol. A test needs two runs on each side. The directory of a cross-validation stands for its
    folds; the test takes them for independent, though their training images overlap.
    """
    from tissuehint.cli.experiments import read_tables
    from tissuehint.cli.output import say, table
    from tissuehint.cli.scores import print_legend, sections

    groups = [[table for folder in group for table in read_tables(folder)] for group in _groups(runs)]
    rows = compared(groups[0], groups[1])
    say(f"A: {len(groups[0])} runs, B: {len(groups[1])} runs; mean +- sample standard deviation")
    heads = ["stage", "gate", "score", "A", "B", "A - B", "p"]
    for place, part in sections(rows):
        table(place, heads, [_cells(row, len(groups[0]), len(groups[1])) for row in part], numbers=4)
    print_legend(rows)
    say("p: Welch's t-test, two-sided; - where a side has fewer than two runs or nothing varies")
    if json_file is not None:
        from tissuehint.files import write_json

        write_json(json_file, {"format": 1, "rows": rows})


def _cells(row: Mapping[str, Any], *runs: int) -> list[str]:
    from tissuehint.cli.output import decimal
    from tissuehint.cli.run import mean_and_std

    sides = []
    for side, count in zip((row["a"], row["b"]), runs, strict=True):
        scored = len(side["values"])
        some = "" if scored == count else f" ({scored} of {count})"
        sides.append(mean_and_std(side["mean"], side["std"]) + some)
    difference = row["difference"]
    signed = "-" if decimal(difference) == "-" else f"{difference:+.3f}"
    return [row["stage"], row["gate"], row["measure"], *sides, signed, decimal(row["p"], 4)]


def compared(
    a: Sequence[Sequence[Mapping[str, Any]]], b: Sequence[Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Each score of each row that both groups have.

    Args:
        a: score rows of each run of the first group.
        b: the same of the second.

    Returns:
        Rows with ``stage``, ``gate``, ``split``, ``protocol``, ``measure``, ``a`` and ``b`` (mean, std, values),
        ``difference`` of the means, and ``p`` (NaN where there is no test).

    Raises:
        InputError: the groups have no row in common.
    """
    from tissuehint.cli.scores import KEYS, in_order, key_of
    from tissuehint.errors import InputError

    first, second = _by_key(a), _by_key(b)
    common = [dict(zip(KEYS, key, strict=True)) for key in first if key in second]
    if not common:
        raise InputError("the two groups", "have no row of the same stage, gate, split and protocol", "check the runs")
    rows = []
    for names in in_order(common):
        for measure, title in MEASURES:
            sides = [[row[measure] for row in group[key_of(names)]] for group in (first, second)]
            rows.append({**names, "measure": title, **_tested(*sides)})
    return rows


def _tested(a: list[float], b: list[float]) -> dict[str, Any]:
    from tissuehint.metrics import mean_std, welch_t_test

    sides: dict[str, Any] = {}
    for name, values in (("a", a), ("b", b)):
        mean, std = mean_std(values)
        sides[name] = {"mean": mean, "std": std, "values": values}
    p = welch_t_test(a, b)["p"] if min(len(a), len(b)) > 1 else float("nan")
    return {**sides, "difference": sides["a"]["mean"] - sides["b"]["mean"], "p": p}


def _by_key(group: Sequence[Sequence[Mapping[str, Any]]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    from tissuehint.cli.scores import key_of

    rows: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for run in group:
        for row in run:
            rows.setdefault(key_of(row), []).append(row)
    return rows


def _groups(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Folders before and after ``--against``; so a shell pattern may stand on either side."""
    from tissuehint.errors import InputError

    unknown = [word for word in words if word.startswith("-") and word != SEPARATOR]
    if unknown:
        raise InputError(f"option {unknown[0]}", "is unknown", "see tissuehint compare --help")
    if words.count(SEPARATOR) != 1:
        raise InputError("compare", f"needs {SEPARATOR} once, between the two groups", "write A... --against B...")
    place = list(words).index(SEPARATOR)
    a, b = ([Path(word) for word in part] for part in (words[:place], words[place + 1 :]))
    if not a or not b:
        raise InputError("compare", "needs a run directory on each side", f"write A... {SEPARATOR} B...")
    resolved = [path.resolve() for path in (*a, *b)]
    twice = next((path for path in (*a, *b) if resolved.count(path.resolve()) > 1), None)
    if twice is not None:
        raise InputError(twice, "is given twice", "give every run once")
    return a, b
