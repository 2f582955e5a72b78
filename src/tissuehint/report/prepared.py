"""Pictures of what a method made before training, as it left them in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tissuehint.report.gallery import UNREADABLE, data_uri
from tissuehint.report.markup import Markup, tag
from tissuehint.report.record import RunRecord

PLACE = "stage1/prepared"
INDEX = f"{PLACE}/pictures.json"
LONG_SIDE = 920  # pixels of the longer side of a picture on the page


def prepared_title(record: RunRecord) -> str | None:
    """Heading of the section; None where the method left no pictures."""
    return None if record.prepared is None else str(record.prepared.get("title") or "Prepared")


def prepared_pictures(record: RunRecord) -> list[Markup]:
    """The text and the pictures, each with its caption."""
    told = record.prepared or {}
    parts = [tag("p", told["text"])] if told.get("text") else []
    pictures = told.get("pictures")
    found = pictures if isinstance(pictures, list) else []
    return [*parts, *(_figure(record, picture if isinstance(picture, Mapping) else {}) for picture in found)]


def _figure(record: RunRecord, picture: Mapping[str, Any]) -> Markup:
    caption = str(picture.get("caption") or "")
    file = str(picture.get("file") or "")
    try:
        # a name of a file beside the index, no path: the page shows what is in the run directory and nothing else
        if not file or "/" in file or "\\" in file:
            raise OSError(f"'{file}' is no name of a file")
        uri, width, height = data_uri(record.folder / PLACE / file, mask=False, labels=None, long_side=LONG_SIDE)
    except UNREADABLE:
        return tag("p", f"The picture {file} cannot be read. {caption}", class_="missing")
    image = tag("img", src=uri, width=width, height=height, alt=caption, loading="lazy")
    return tag("figure", tag("figcaption", caption), image, class_="prepared")
