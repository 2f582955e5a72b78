"""The score table of a run, and what it says in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tissuehint.cli.output import decimal, say, table

Row = Mapping[str, Any]

KEYS = ("stage", "gate", "split", "protocol")
# predicted first: what a user gets without labels; then what looks at labels
_ORDER = (
    ("stage2", "none"),
    ("stage1", "predicted"),
    ("ceiling", "none"),
    ("stage1", "oracle"),
    ("pseudo_masks", "oracle"),
    ("tags_only", "oracle"),
)
_MEASURES = (
    ("miou", "mIoU"),
    ("fwiou", "FwIoU"),
    ("dice_mean", "Dice"),
    ("accuracy", "Acc."),
    ("boundary_miou", "bIoU"),
)
_PROTOCOL_NOTES = {
    "ignore_white": "A ignore_white: white pixels are left out",
    "fp_on_white": "B fp_on_white: tissue predicted on white is wrong",
    "five_class": "C five_class: white may be predicted, means are over tissue classes",
}
_GATE_NOTES = {
    "predicted": "predicted: the model itself closes classes that it finds absent",
    "oracle": "oracle: the labels of the scored images close classes",
    "none": "none: no class is closed",
}


def key_of(row: Row) -> tuple[str, ...]:
    """Rows with the same stage, gate, split and protocol may be compared."""
    return tuple(str(row.get(key, "")) for key in KEYS)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows of one split and protocol together; inside, predicted rows first."""
    from tissuehint.metrics import PROTOCOL_IDS

    splits, protocols = ("test", "val", "train"), list(PROTOCOL_IDS)

    def place(row: Row) -> tuple[int, ...]:
        kind = (row.get("stage", ""), row.get("gate", ""))
        return (
            splits.index(row["split"]) if row.get("split") in splits else len(splits),
            protocols.index(row["protocol"]) if row.get("protocol") in protocols else len(protocols),
            _ORDER.index(kind) if kind in _ORDER else len(_ORDER),
        )

    return sorted(rows, key=place)


def sections(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that may be compared with one another, under a title that names their split and protocol."""
    from itertools import groupby

    def title(row: Row) -> str:
        return f"{row.get('split', '')}, protocol {protocol_name(row)}"

    return [(name, list(group)) for name, group in groupby(in_order(rows), key=title)]


def print_scores(rows: Sequence[Row], title: str) -> None:
    """Print all rows with their protocol and gate, and what these mean."""
    heads = ["stage", "gate", "model", *(name for _, name in _MEASURES)]
    for place, group in sections(rows):
        cells = [
            [str(row.get(key, "")) for key in ("stage", "gate", "name")]
            + [decimal(row.get(key)) for key, _ in _MEASURES]
            for row in group
        ]
        table(f"{title}: {place}", heads, cells, numbers=len(_MEASURES))
    print_legend(rows)


def print_legend(rows: Sequence[Row]) -> None:
    """What the protocols and gates of these rows mean."""
    for notes, key in ((_PROTOCOL_NOTES, "protocol"), (_GATE_NOTES, "gate")):
        for name, text in notes.items():
            if any(row.get(key) == name for row in rows):
                say(f"{key} {text}")
    widths = sorted({str(row["boundary_distance"]) for row in rows if "boundary_distance" in row})
    if widths:
        say(f"bIoU: boundary IoU, {' or '.join(widths)} px wide")


def print_summary(scores: Mapping[str, Any]) -> None:
    """The headline, its distance to predicting the tags alone, the weak/full ratio."""
    from tissuehint.report.scores import headline_row

    row = headline_row(scores["rows"])
    if row is None:
        return
    where = f"protocol {protocol_name(row)}, gate {row['gate']}, {row['split']}"
    say(f"result: mIoU {decimal(row['miou'])} of {stage_name(row)} ({where})")
    floor = next((other for other in scores["rows"] if other["stage"] == "tags_only" and _alike(row, other)), None)
    if floor is not None and math.isfinite(row["miou"]) and math.isfinite(floor["miou"]):
        gain = row["miou"] - floor["miou"]
        where = f"protocol {protocol_name(floor)}, gate {floor['gate']}, {floor['split']}"
        say(f"gain: {gain:+.3f} mIoU over the tags alone, which reach {decimal(floor['miou'])} ({where})")
    ratio = scores.get("weak_full_ratio")
    if ratio:  # of the first scored split and protocol, which need not be those of the result
        say(f"weak/full ratio: mIoU {decimal(ratio['miou'])}, Dice {decimal(ratio['dice_mean'])} of the same network "
            f"trained with full masks (protocol {protocol_name(ratio)}, {ratio['split']})")  # fmt: skip


def stage_name(row: Row) -> str:
    """Stage and model in words."""
    return " ".join(part for part in (str(row.get("stage", "")), f"({row['name']})" if row.get("name") else "") if part)


def protocol_name(row: Row) -> str:
    """Letter and name of the protocol for white pixels, as ``A ignore_white``."""
    from tissuehint.metrics import PROTOCOL_IDS

    name = str(row.get("protocol", ""))
    letter = next((letter for protocol, letter in PROTOCOL_IDS.items() if protocol == name), "")
    return f"{letter} {name}".strip()


def _alike(row: Row, other: Row) -> bool:
    return bool(row["split"] == other["split"] and row["protocol"] == other["protocol"])
