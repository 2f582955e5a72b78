"""The folds of a cross-validation: their headline scores and the way to their pages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tissuehint.report.markup import Markup, join, tag
from tissuehint.report.record import STAGE_TITLES, RunRecord, is_spread
from tissuehint.report.scores import MEASURES, decimal, headline_row, protocol_name


def fold_table(record: RunRecord) -> Markup:
    """One line a fold: a link to its page, and the scores of the headline row; last their mean and spread."""
    row = headline_row(record.rows) or {}
    measures = [(name, row[key]) for key, name, _ in MEASURES if is_spread(row.get(key))]
    if record.ratio is not None and is_spread(record.ratio.get("miou")):
        measures.append(("Weak/full (mIoU)", record.ratio["miou"]))
    heads = [tag("th", "Fold", scope="col"), tag("th", "Images", scope="col", class_="number")]
    heads += [tag("th", name, scope="col", class_="number") for name, _ in measures]
    images = row.get("images")
    body = []
    for place, fold in enumerate(record.folds):
        count = _at(images, place)
        cells = [tag("th", tag("a", fold, href=f"{fold}/report.html"), scope="row")]
        cells += [tag("td", "n/a" if count is None else count, class_="number")]
        cells += [tag("td", decimal(_at(score["values"], place)), class_="number") for _, score in measures]
        body.append(tag("tr", *cells))
    means = [tag("td", decimal(score), class_="number") for _, score in measures]
    body.append(tag("tr", tag("th", "mean ± sd", scope="row"), tag("td"), *means))
    caption = _caption(row)
    table = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), tag("tbody", *body))
    frame = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)
    told = "Each fold is a whole run with a page and a model of its own; sd is the sample standard deviation."
    return join([frame, tag("p", told)])


def _caption(row: Mapping[str, Any]) -> str:
    if not row:
        return "Folds"
    stage = STAGE_TITLES.get(row["stage"], row["stage"])
    return f"{stage}, {row.get('split')}, protocol {protocol_name(row)}, gate {row.get('gate')}"


def _at(values: Any, place: int) -> Any:
    return values[place] if isinstance(values, list) and place < len(values) else None
