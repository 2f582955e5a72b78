"""``summary.html``: the slides of a cohort to look at and to filter; reads the folder of a cohort, nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tissuehint.errors import InputError
from tissuehint.files import write_text
from tissuehint.report.document import document
from tissuehint.report.markup import Markup, join, tag

STATE_FILE, SUMMARY_FILE = "slide.json", "summary.html"
STATES = {"done": "done", "failed": "failed", "running": "not finished"}


def write_summary(folder: Path) -> Path:
    """Write ``summary.html`` of a cohort: its slides, their areas, and a gallery that can be filtered.

    The page shows the overlays that lie in the folders of the slides, so it moves with the folder as a whole.

    Args:
        folder: what ``tissuehint predict --out`` wrote.

    Returns:
        The path of the page.

    Raises:
        InputError: no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(folder, "is not a directory", "give the --out folder of tissuehint predict")
    target = folder / SUMMARY_FILE
    write_text(target, _page(folder))
    return target


def _page(folder: Path) -> str:
    slides = [_read(file) for file in sorted(folder.glob(f"*/{STATE_FILE}"))]
    colours = _colours(slides)
    classes = list(dict.fromkeys(row["class"] for slide in slides for row in slide["areas"]))
    counts = {state: sum(slide["state"] == state for slide in slides) for state in STATES}
    told = ", ".join(f"{count} {STATES[state]}" for state, count in counts.items() if count) or "no slides yet"
    header = tag(
        "header",
        tag(
            "div",
            tag("p", "tissuehint slides", class_="eyebrow"),
            tag("button", "Dark page", type="button", id="theme", hidden=True),
            class_="header-top",
        ),
        tag("h1", folder.resolve().name),
        tag("span", told, class_=f"chip {'done' if counts['done'] == len(slides) else 'waiting'}"),
    )
    gallery = tag(
        "section",
        tag("h2", "Slides"),
        _controls(counts),
        tag("div", *(_card(slide, colours) for slide in slides), class_="slides", id="slides"),
        tag("p", "No slide fits.", class_="missing", id="nothing", hidden=True),
    )
    table = tag("section", tag("h2", "Areas"), _table(slides, classes, colours))
    body = join([header, tag("main", gallery, table)])
    footer = "The pictures lie in the folders of the slides. This page asks the network for nothing."
    return document(f"{folder.resolve().name}: slides", body, "cohort.js", pictures="'self' file: data:", footer=footer)


def _controls(counts: Mapping[str, int]) -> Markup:
    states = [tag("option", "all", value="")]
    states += [tag("option", f"{STATES[state]} ({count})", value=state) for state, count in counts.items() if count]
    return tag(
        "div",
        tag("div", tag("label", "Name", for_="filter"), tag("input", id="filter", type="search"), class_="order"),
        tag("div", tag("label", "State", for_="state"), tag("select", *states, id="state"), class_="order"),
        tag("div", tag("label", "Order", for_="order"), tag("select", id="order"), class_="order"),
        class_="controls",
    )


def _card(slide: Mapping[str, Any], colours: Mapping[str, str]) -> Markup:
    state, name = slide["state"], slide["name"]
    shares = [(row["class"], _number(row.get("percent_of_tissue"))) for row in slide["areas"]]
    shares = [(label, share) for label, share in shares if share is not None]
    picture = None
    if slide["picture"]:
        address = f"{quote(name)}/{slide['picture']}"
        image = tag("img", src=address, alt=f"{name} with its classes", loading="lazy")
        picture = tag("a", image, href=address, target="_blank", rel="noopener")
    bar = [tag("span", style=f"width:{share:.3f}%;background:{colours.get(label)}") for label, share in shares]
    listed = [
        tag(
            "li",
            tag("span", class_="swatch", style=f"--class:{colours.get(label)}"),
            f"{label} {share:.1f} %",
        )
        for label, share in shares
    ]
    values = json.dumps({"tissue": slide["tissue_mm2"] or 0} | {f"{label} %": share for label, share in shares})
    area = "" if slide["tissue_mm2"] is None else f"{slide['tissue_mm2']:.2f} mm\u00b2 of tissue"
    chip = "done" if state == "done" else "waiting"
    return tag(
        "article",
        picture,
        tag("h3", name),
        tag("p", tag("span", STATES.get(state, state), class_=f"chip {chip}"), " ", area),
        tag("div", *bar, class_="shares") if bar else None,
        tag("ul", *listed, class_="legend") if listed else None,
        tag("p", slide["error"], class_="warning") if slide["error"] else None,
        class_="slide",
        data_name=name,
        data_state=state,
        data_values=values,
    )


def _table(slides: list[dict[str, Any]], classes: list[str], colours: Mapping[str, str]) -> Markup:
    heads = [
        "Slide",
        "State",
        "Tissue, mm\u00b2",
        *(f"{name}, {unit}" for name in classes for unit in ("mm\u00b2", "%")),
    ]
    rows = []
    for slide in slides:
        areas = {row["class"]: row for row in slide["areas"]}
        values = [slide["tissue_mm2"]]
        for name in classes:
            row = areas.get(name, {})
            values += [_number(row.get("mm2")), _number(row.get("percent_of_tissue"))]
        cells = [_cell(value) for value in values]
        rows.append(
            tag("tr", tag("th", slide["name"], scope="row"), tag("td", STATES.get(slide["state"], "?")), *cells)
        )
    head = [tag("th", name, scope="col", class_="number" if place > 1 else None) for place, name in enumerate(heads)]
    table = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), class_="sortable")
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label="Areas of all slides")


def _cell(value: float | None) -> Markup:
    if value is None:
        return tag("td", "-", class_="number none")
    return tag("td", f"{value:.3g}" if value < 1 else f"{value:.2f}", class_="number", data_value=value)


def _read(file: Path) -> dict[str, Any]:
    """What is shown of a slide; one whose record is damaged is a failed one."""
    folder = file.parent
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        areas = [dict(row) for row in found.get("areas") or []]
        names = found.get("labels", {}).get("names", [])
        shown = {
            "state": str(found["state"]),
            "error": found.get("error"),
            "areas": [row for row in areas if row.get("class") in names],
            "tissue_mm2": _number(found.get("tissue_mm2")),
            "labels": found.get("labels") or {},
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        shown = {
            "state": "failed",
            "error": f"{file.name} cannot be read; delete the folder of this slide and run it again",
            "areas": [],
            "tissue_mm2": None,
            "labels": {},
        }
    pictures = [name for name in ("overlay.jpg", "thumbnail.jpg") if (folder / name).is_file()]
    return {"name": folder.name, "picture": pictures[0] if pictures else None, **shown}


def _colours(slides: list[dict[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for slide in slides:
        labels = slide["labels"]
        for name, colour in zip(labels.get("names", []), labels.get("colours", []), strict=False):
            red, green, blue = (int(part) for part in colour)
            found.setdefault(str(name), f"rgb({red} {green} {blue})")
    return found


def _number(value: Any) -> float | None:
    try:
        return None if value is None or value == "" else float(value)
    except (TypeError, ValueError):
        return None
