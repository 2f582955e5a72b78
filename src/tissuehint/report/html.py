"""``write_report``: the page of a run, in one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tissuehint.errors import InputError
from tissuehint.files import write_text
from tissuehint.report.document import document
from tissuehint.report.folds import fold_table
from tissuehint.report.gallery import gallery
from tissuehint.report.markup import Markup, join, tag
from tissuehint.report.plots import training_charts
from tissuehint.report.prepared import picture_sections, section_pictures
from tissuehint.report.record import STAGE_TITLES, STAGES, RunRecord, number, read_run, stage_title
from tissuehint.report.scores import class_tables, headline, notes, published, score_table

SECTIONS = (
    ("gallery", "Gallery"),
    ("scores", "Scores"),
    ("curves", "Training"),
    ("model", "Model"),
    ("recipe", "Recipe"),
    ("environment", "Environment"),
)
FOLD_SECTIONS = (("folds", "Folds"), ("scores", "Scores"), ("recipe", "Recipe"))


def write_report(run: Path) -> Path:
    """Write ``report.html`` of a run directory: one page without outside requests, that opens from a disk.

    Reads the run directory and nothing else. A part that is missing (no stage 2, no scores yet) is said on the page;
    so is a part that cannot be read. Of a cross-validation it shows means and spreads, and leads to the pages of the
    folds. The same directory gives the same page, byte for byte.

    Args:
        run: the run directory; it needs ``recipe.yaml`` at least.

    Returns:
        The path of the page, ``run/report.html``.

    Raises:
        InputError: ``run`` is not a directory, or has no readable ``recipe.yaml``.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(run, "is not a directory", "give the directory of a run")
    target = run / "report.html"
    write_text(target, page(read_run(run)))
    return target


def page(record: RunRecord) -> str:
    """The whole page as text."""
    return document(f"{_name(record)}: tissuehint report", _body(record), "page.js")


def _body(record: RunRecord) -> Markup:
    scores = _section("scores", "Scores", score_table(record), notes(), published(record), *class_tables(record))
    if record.folds:
        table = _section("folds", "Folds", fold_table(record))
        return _page(record, FOLD_SECTIONS, table, scores, _section("recipe", "Recipe", _recipe(record)))
    left = picture_sections(record)
    pictures = [_section(name, title, *section_pictures(record, name)) for name, title in left]
    sections = (SECTIONS[0], *left, *SECTIONS[1:])
    return _page(
        record,
        sections,
        _section("gallery", "Gallery", gallery(record)),
        *pictures,
        scores,
        _section("curves", "Training", _stage_list(record), _curves(record)),
        _section("model", "Use the model", _model(record)),
        _section("recipe", "Recipe", _recipe(record)),
        _section("environment", "Environment", _environment(record.environment)),
    )


def _page(record: RunRecord, names: Sequence[tuple[str, str]], *sections: Markup | None) -> Markup:
    links = [tag("a", title, href=f"#{name}") for name, title in names]
    navigation = tag("nav", *links, aria_label="Sections")
    return join([_header(record), navigation, tag("main", _problems(record), _top(record), *sections)])


def _header(record: RunRecord) -> Markup:
    waiting = () if record.folds else record.waiting()
    if not waiting and record.scored:
        state = tag("span", "finished", class_="chip done")
    else:
        missing = [STAGE_TITLES[stage].lower() for stage in waiting] + ([] if record.scored else ["scores"])
        state = tag("span", f"not finished: {', '.join(missing)} to come", class_="chip waiting")
    facts = [
        ("Method", _named(record.recipe.get("method"), "name")),
        ("Data", _named(record.recipe.get("data"), "source")),
        ("Seed", record.recipe.get("seed", "not stated")),
    ]
    if record.folds:
        facts.append(("Cross-validation", f"{len(record.folds)} folds"))
    listed = [tag("div", tag("dt", term), tag("dd", fact)) for term, fact in facts]
    theme = tag("button", "Dark page", type="button", id="theme", hidden=True)
    top = tag("div", tag("p", "tissuehint run", class_="eyebrow"), theme, class_="header-top")
    return tag("header", top, tag("h1", _name(record)), state, tag("dl", *listed, class_="facts"))


def _top(record: RunRecord) -> Markup:
    told = record.notes if record.folds else (record.environment or {}).get("notes")
    return tag("section", tag("h2", "Headline"), headline(record), *_data_notes(told), id="headline")


def _section(name: str, title: str, *parts: object) -> Markup:
    return tag("section", tag("h2", title), *parts, id=name)


def _problems(record: RunRecord) -> Markup | None:
    if not record.problems:
        return None
    listed = tag("ul", *(tag("li", problem) for problem in record.problems))
    return tag("section", tag("h2", "Parts that cannot be read"), listed, class_="problems")


def _stage_list(record: RunRecord) -> Markup:
    rows = []
    for stage in STAGES:
        done = record.done.get(stage)
        if done is not None:
            told = join(filter(None, [_duration(number(done.get("seconds"))), _steps(done)]), ", ") or "finished"
            state = tag("li", tag("strong", STAGE_TITLES[stage]), tag("span", told), class_="done")
        elif record.expected(stage):
            state = tag("li", tag("strong", STAGE_TITLES[stage]), tag("span", "not finished"), class_="waiting")
        else:
            state = tag("li", tag("strong", STAGE_TITLES[stage]), tag("span", "not in this run"))
        rows.append(state)
    return tag("ol", *rows, class_="stages")


def _curves(record: RunRecord) -> Markup:
    charts = [chart for stage, curves in record.curves.items() for chart in training_charts(stage, curves)]
    empty = [stage_title(stage) for stage, curves in record.curves.items() if not curves.series]
    parts: list[Markup] = [tag("div", *charts, class_="charts")] if charts else []
    if empty:
        parts.append(tag("p", f"The log is empty: {', '.join(empty)}.", class_="missing"))
    if not record.curves:
        parts.append(tag("p", "No stage has a log of its training yet.", class_="missing"))
    return join(parts)


def _model(record: RunRecord) -> Markup:
    if record.model is None:
        return tag("p", "This run has no model yet; it is saved at the end of the last stage.", class_="missing")
    path = f"{record.folder.resolve().name}/model"
    code = (
        "from tissuehint import TissueModel\n\n"
        f"model = TissueModel.load({path!r})\n"
        'tissue_map = model.predict("patch.png")  # (classes, height, width), probabilities\n'
        "classes = model.classes(tissue_map)  # (height, width), index of the likeliest class\n"
    )
    said = "The model folder is complete by itself: weights, classes, pixel size and normalisation. It may be copied."
    return join([tag("pre", tag("code", code), tabindex=0), tag("p", said)])


def _recipe(record: RunRecord) -> Markup:
    code = tag("pre", tag("code", record.recipe_text), tabindex=0)
    return tag("details", tag("summary", "The resolved recipe (YAML)"), code)


def _environment(environment: Mapping[str, Any] | None) -> Markup:
    if not environment:
        return tag("p", "This run has no record of its environment.", class_="missing")
    packages = environment.get("packages")
    plain = {key: value for key, value in environment.items() if key not in ("packages", "notes")}
    parts = [_pairs("Environment", plain)]
    if isinstance(packages, dict) and packages:
        parts.append(tag("details", tag("summary", f"{len(packages)} packages"), _pairs("Packages", packages)))
    return join(parts)


def _data_notes(found: Any) -> list[Markup]:
    """What must stand beside every number: how the split was made, patients in two splits, the licence."""
    if not found:
        return []
    listed = found if isinstance(found, list | tuple) else [found]
    return [tag("h3", "Notes on the data"), tag("ul", *(tag("li", _plain(note)) for note in listed))]


def _pairs(caption: str, values: Mapping[str, Any]) -> Markup:
    rows = [tag("tr", tag("th", key, scope="row"), tag("td", _plain(value))) for key, value in values.items()]
    table = tag("table", tag("caption", caption), tag("tbody", *rows), class_="pairs")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _plain(value: Any) -> str:
    if value is None:
        return "not stated"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _name(record: RunRecord) -> str:
    return str(record.recipe.get("name") or record.folder.resolve().name)


def _named(section: Any, key: str) -> str:
    value = section.get(key) if isinstance(section, Mapping) else section
    return _plain(value)


def _steps(done: Mapping[str, Any]) -> str | None:
    steps = number(done.get("steps"))
    return f"{steps:.0f} steps" if steps == steps and steps > 0 else None


def _duration(seconds: float) -> str | None:
    if not 0 <= seconds < float("inf"):
        return None
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
