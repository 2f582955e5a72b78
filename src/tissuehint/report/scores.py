"""The numbers of a run: headline, table of scores, bars per class. Every number says its protocol and gate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tissuehint.labels import LabelSpace
from tissuehint.report.markup import Markup, join, tag
from tissuehint.report.record import STAGE_TITLES, RunRecord, is_spread, number

Row = Mapping[str, Any]

PROTOCOLS = {"ignore_white": "A", "fp_on_white": "B", "five_class": "C"}
PROTOCOL_NOTES = (
    ("A ignore_white", "pixels that are white in the truth are left out."),
    ("B fp_on_white", "white pixels count, and the prediction is one of the tissue classes: each is a false positive."),
    ("C five_class", "white pixels count and may be predicted as white; the mean is over the tissue classes."),
)
GATE_NOTES = (
    ("predicted", "classes that the model itself finds absent from an image are closed."),
    ("oracle", "classes absent from the image's own labels are closed: this looks at the labels of the scored split."),
    ("none", "no class is closed."),
)
MEASURES = (
    ("miou", "mIoU", "mean intersection over union of the tissue classes, all pixels of the split pooled"),
    ("fwiou", "FwIoU", "intersection over union weighted by how often a class occurs in the truth"),
    ("dice_mean", "Dice (mean)", "mean of the Dice scores of the tissue classes"),
    ("dice_from_miou", "Dice (from mIoU)", "2 mIoU / (1 + mIoU)"),
    ("accuracy", "Accuracy", "share of scored pixels that are right"),
    ("boundary_miou", "Boundary mIoU", "mean boundary IoU; the width of the band inside each contour stands beside it"),
)
CLASS_MEASURES = {"iou": "IoU by class", "boundary_iou": "Boundary IoU by class"}
RATIO_NAMES = {key: name for key, name, _ in MEASURES}
_NO_MEASURE = frozenset({"stage", "name", "split", "gate", "protocol", "images", "pixels", "boundary_distance"})
NOTHING_SCORED = "Nothing was scored: no image of the scored splits has a mask."


def headline_row(rows: Sequence[Row]) -> Row | None:
    """The row that stands for the run: its last trained weak model, scored without looking at labels, test before val.

    Chosen by place in the run, not by value; never an ``oracle`` row, a pseudo mask or the full-mask ceiling.
    """
    stages, splits = ("stage2", "stage1"), ("test", "val")
    fitting = [
        row
        for row in rows
        if row.get("stage") in stages and row.get("gate") != "oracle" and math.isfinite(number(row.get("miou")))
    ]

    def place(row: Row) -> tuple[int, int]:
        split = row.get("split")
        return stages.index(row["stage"]), splits.index(split) if split in splits else len(splits)

    return min(fitting, key=place, default=None)


def headline(record: RunRecord) -> Markup:
    """The cards at the top of the page."""
    row = headline_row(record.rows)
    if row is None:
        said = "No trained model is scored without label oracle yet." if record.rows else _no_rows(record)
        return join([tag("p", said, class_="missing"), tag("div", _ratio_card(record), class_="cards")])
    told = f"{_stage(row)}, {row.get('split', 'split not stated')}"
    conditions = f"protocol {protocol_name(row)}, gate {row.get('gate', 'not stated')}"
    cards = [_card("mIoU", decimal(row.get("miou")), told, conditions, main=True)]
    cards.append(_card("Dice (mean)", decimal(row.get("dice_mean")), told, conditions))
    if math.isfinite(number(row.get("boundary_miou"))):
        band = f"{told}, band {_distance(row)}"
        cards.append(_card("Boundary mIoU", decimal(row.get("boundary_miou")), band, conditions))
    floor = _like(record.rows, row, "tags_only")
    if floor is not None:
        gain = number(row.get("miou")) - number(floor.get("miou"))
        told = f"mIoU above predicting the tags alone ({decimal(floor.get('miou'))})"
        same = f"protocol {protocol_name(floor)}, gate {floor.get('gate', 'not stated')} for the tags"
        cards.append(_card("Gain", f"{gain:+.3f}" if math.isfinite(gain) else "n/a", told, same))
    cards.append(_ratio_card(record))
    return tag("div", *cards, class_="cards")


def score_table(record: RunRecord) -> Markup:
    """All rows with all scalar measures, sortable."""
    if not record.rows:
        return tag("p", _no_rows(record), class_="missing")
    measures = [entry for entry in MEASURES if any(entry[0] in row for row in record.rows)]
    measures += [(key, _title(key), "") for key in _extra_measures(record.rows)]
    heads = [*_identity_heads(), tag("th", "Images", scope="col", class_="number")]
    heads += [tag("th", name, scope="col", class_="number", title=note or None) for _, name, note in measures]
    chosen = headline_row(record.rows)
    body = []
    for row in record.rows:
        cells = [*_identity_cells(row), _count_cell(row.get("images"))]
        cells += [
            _number_cell(row.get(key), _distance(row) if key == "boundary_miou" else None) for key, _, _ in measures
        ]
        body.append(tag("tr", *cells, class_="chosen" if row is chosen else None))
    return _table("All scores", heads, body)


def published(record: RunRecord) -> Markup | None:
    """Numbers of papers that the recipe quotes, to be read beside ours."""
    quoted = record.recipe.get("published")
    if not isinstance(quoted, Mapping) or not quoted:
        return None
    rows = [tag("tr", tag("th", name, scope="row"), tag("td", str(value))) for name, value in quoted.items()]
    table = tag("table", tag("caption", "Published, as the recipe quotes it"), tag("tbody", *rows), class_="pairs")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Published numbers")


def class_tables(record: RunRecord) -> list[Markup]:
    """One table with bars for each measure that is given per class (IoU, boundary IoU and others a run may add)."""
    keys = dict.fromkeys(
        [*CLASS_MEASURES, *(key for row in record.rows for key, value in row.items() if _by_class(value))]
    )
    tables = []
    for key in keys:
        rows = [row for row in record.rows if _by_class(row.get(key))]
        if rows:
            tables.append(_class_table(key, rows, record.labels))
    return tables


def notes() -> Markup:
    """What the protocols and gates mean."""
    entries = [join([tag("dt", name), tag("dd", note)]) for name, note in (*PROTOCOL_NOTES, *GATE_NOTES)]
    rule = tag("p", "Compare only rows of the same split, protocol and gate.")
    return tag("details", tag("summary", "What the protocols and gates mean"), rule, tag("dl", *entries))


def decimal(value: Any) -> str:
    """Three decimals, ``0.712 ± 0.010`` of a score over several runs; ``n/a`` where there is no number."""
    measured = number(value)
    if not math.isfinite(measured):
        return "n/a"
    spread = number(value["std"]) if is_spread(value) else math.nan
    return f"{measured:.3f} ± {spread:.3f}" if math.isfinite(spread) else f"{measured:.3f}"


def protocol_name(row: Row) -> str:
    """Letter and name of the protocol for white pixels, as ``A ignore_white``."""
    name = str(row.get("protocol") or "not stated")
    return f"{PROTOCOLS[name]} {name}" if name in PROTOCOLS else name


def colour_style(labels: LabelSpace | None, name: str) -> str:
    """CSS custom property with the colour of a class."""
    if labels is None or name not in labels.names:
        return "--class: var(--accent)"
    red, green, blue = labels.colours[labels.index(name)]
    return f"--class: rgb({red} {green} {blue})"


def _card(title: str, value: str, told: str, conditions: str, main: bool = False) -> Markup:
    parts = [
        tag("h3", title),
        tag("p", value, class_="value"),
        tag("p", told),
        tag("p", conditions, class_="conditions"),
    ]
    return tag("div", *parts, class_="card main" if main else "card")


def _ratio_card(record: RunRecord) -> Markup:
    ratio = record.ratio
    if ratio is None:
        waiting = "ceiling" in record.waiting()
        told = "the ceiling is not finished" if waiting else "no ceiling with full masks was trained in this run"
        return _card("Weak/full ratio", "n/a", told, "needs the same network trained with full masks")
    others = [f"{RATIO_NAMES.get(key, key)} {_said(value)}" for key, value in ratio.items() if key != "miou"]
    told = "mIoU of the weakly trained model over the same network with full masks"
    conditions = ", ".join(others) or "same data, same budget"
    return _card("Weak/full ratio", decimal(ratio.get("miou")), told, conditions)


def _like(rows: Sequence[Row], row: Row, stage: str) -> Row | None:
    alike = (other for other in rows if other.get("stage") == stage)
    keys = ("split", "protocol")
    return next((other for other in alike if all(other.get(key) == row.get(key) for key in keys)), None)


def _class_table(key: str, rows: Sequence[Row], labels: LabelSpace | None) -> Markup:
    known = labels.names if labels else ()
    found = dict.fromkeys(name for row in rows for name in row[key])
    names = [name for name in known if name in found] + [name for name in found if name not in known]
    band = key == "boundary_iou"
    heads = [*_identity_heads(), tag("th", "Band", scope="col") if band else None]
    heads += [tag("th", name, scope="col", class_="bar") for name in names]
    body = []
    for row in rows:
        cells = [*_identity_cells(row), tag("td", _distance(row)) if band else None]
        cells += [_bar_cell(row[key].get(name), colour_style(labels, name)) for name in names]
        body.append(tag("tr", *cells))
    return _table(CLASS_MEASURES.get(key, f"{_title(key)} by class"), heads, body)


def _table(caption: str, heads: Iterable[object], body: Iterable[object]) -> Markup:
    table = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        class_="sortable",
    )
    # a wide table scrolls in its own frame, and the keyboard can reach that frame
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _identity_heads() -> list[Markup]:
    names = ("Stage", "Split", "Gate", "Protocol")
    return [tag("th", name, scope="col") for name in names]


def _identity_cells(row: Row) -> list[Markup]:
    name = row.get("name")
    stage = tag("th", _stage(row), tag("small", name) if name else None, scope="row")
    gate = str(row.get("gate") or "not stated")
    seen = tag("span", gate, class_="chip oracle" if gate == "oracle" else "chip")
    return [stage, tag("td", row.get("split") or "not stated"), tag("td", seen), tag("td", protocol_name(row))]


def _number_cell(value: Any, beside: str | None = None) -> Markup:
    measured = number(value)
    if not math.isfinite(measured):
        return tag("td", "n/a", class_="number none")
    small = tag("small", beside) if beside else None
    return tag("td", decimal(value), small, class_="number", data_value=repr(measured), title=f"{measured:.6g}")


def _by_class(value: Any) -> bool:
    """Whether this is a score of each class."""
    return isinstance(value, dict) and bool(value) and not is_spread(value)


def _count_cell(value: Any) -> Markup:
    if isinstance(value, list):  # one count a fold
        return tag("td", ", ".join(f"{count}" for count in value), class_="number")
    count = number(value)
    if not math.isfinite(count):
        return tag("td", "n/a", class_="number none")
    return tag("td", f"{count:.0f}", class_="number", data_value=repr(count))


def _bar_cell(value: Any, colour: str) -> Markup:
    measured = number(value)
    if not math.isfinite(measured):
        return tag("td", "n/a", class_="bar none", title="absent from truth and prediction, or not scored")
    length = 100 * min(max(measured, 0.0), 1.0)
    bar = tag("span", tag("span", style=f"width: {length:.1f}%; {colour}"), class_="track", aria_hidden="true")
    return tag("td", decimal(value), bar, class_="bar", data_value=repr(measured), title=f"{measured:.6g}")


def _extra_measures(rows: Sequence[Row]) -> list[str]:
    known = {key for key, _, _ in MEASURES} | _NO_MEASURE
    return list(
        dict.fromkeys(
            key for row in rows for key, value in row.items() if key not in known and math.isfinite(number(value))
        )
    )


def _stage(row: Row) -> str:
    stage = str(row.get("stage", "stage not stated"))
    return STAGE_TITLES.get(stage, stage)


def _no_rows(record: RunRecord) -> str:
    return NOTHING_SCORED if record.scored else "There are no scores yet."


def _said(value: Any) -> str:
    return value if isinstance(value, str) else decimal(value)


def _distance(row: Row) -> str:
    """Width of the boundary band; ``4 to 7 px`` where images differ in size."""
    written = row.get("boundary_distance")
    if isinstance(written, str) and written:
        return f"{written} px"
    width = number(written)
    return f"{width:g} px" if math.isfinite(width) else "not stated"


def _title(key: str) -> str:
    words = {"auc": "AUC", "mae": "MAE", "kl": "KL", "w1": "W1", "miou": "mIoU"}
    first, *others = key.split("_")
    return " ".join([words.get(first, first.capitalize()), *(words.get(word, word) for word in others)])
