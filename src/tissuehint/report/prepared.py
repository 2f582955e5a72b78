"""Pictures that a method left in the run directory: of what it made before training, and of what it learned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tissuehint.report.gallery import UNREADABLE, data_uri
from tissuehint.report.markup import Markup, tag
from tissuehint.report.record import PICTURE_PLACES, RunRecord

LONG_SIDE = 920  # pixels of the longer side of a picture on the page


def picture_sections(record: RunRecord) -> list[tuple[str, str]]:
    """Name and heading of each section that the method left pictures for."""
    return [(name, str(told.get("title") or name.capitalize())) for name, told in record.pictures.items()]


def section_pictures(record: RunRecord, name: str) -> list[Markup]:
    """The text and the pictures of a section, each with its caption."""
    told = record.pictures[name]
    parts = [tag("p", told["text"])] if told.get("text") else []
    pictures = told.get("pictures")
    found = pictures if isinstance(pictures, list) else []
    place = record.folder / PICTURE_PLACES[name]
    return [*parts, *(_figure(place, picture if isinstance(picture, Mapping) else {}) for picture in found)]


def _figure(place: Path, picture: Mapping[str, Any]) -> Markup:
    caption = str(picture.get("caption") or "")
    file = str(picture.get("file") or "")
    try:
        # a name of a file beside the index, no path: the page shows what is in the run directory and nothing else
        if not file or "/" in file or "\\" in file:
            raise OSError(f"'{file}' is no name of a file")
        uri, width, height = data_uri(place / file, mask=False, labels=None, long_side=LONG_SIDE)
    except UNREADABLE:
        return tag("p", f"The picture {file} cannot be read. {caption}", class_="missing")
    image = tag("img", src=uri, width=width, height=height, alt=caption, loading="lazy")
    return tag("figure", tag("figcaption", caption), image, class_="prepared")
