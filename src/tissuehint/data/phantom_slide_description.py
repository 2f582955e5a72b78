"""What a phantom slide says of itself, in the words of two scanners, so that readers find its pixel size and bounds."""

from __future__ import annotations

from collections.abc import Sequence


def aperio(height: int, width: int, tile: int, quality: int, um_per_px: float) -> str:
    """The ImageDescription of level 0 of an Aperio slide of ``height`` x ``width`` px."""
    size = f"{width}x{height}"
    return (
        f"Aperio Image Library, phantom of tissuehint\r\n{size} [0,0 {size}] ({tile}x{tile}) "
        f"JPEG/RGB Q={quality}|AppMag = {10 / um_per_px:g}|MPP = {um_per_px:g}"
    )


def leica(
    sizes: Sequence[tuple[int, int]], macro: tuple[int, int], margins: tuple[int, int, int, int], um_per_px: float
) -> str:
    """The description of a Leica slide: lengths are nanometres, the macro image covers everything.

    Args:
        sizes: (height, width) of the levels in px.
        macro: (height, width) of the macro image in px.
        margins: glass above, left of, below and right of what was scanned, in px of level 0.
        um_per_px: of level 0.
    """
    top, left, bottom, right = margins
    height, width = sizes[0]
    nanometres = 1000 * um_per_px
    whole = {
        "sizeX": round((width + left + right) * nanometres),
        "sizeY": round((height + top + bottom) * nanometres),
    }
    view = {
        "sizeX": round(width * nanometres),
        "sizeY": round(height * nanometres),
        "offsetX": round(left * nanometres),
        "offsetY": round(top * nanometres),
    }
    return (
        '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f'<collection name="phantom" {_attributes(whole)}>'
        + _leica_image("macro", {**whole, "offsetX": 0, "offsetY": 0}, [macro], 0)
        + _leica_image("scan", view, sizes, 1)
        + "</collection></scn>"
    )


def _leica_image(name: str, view: dict[str, int], sizes: Sequence[tuple[int, int]], first: int) -> str:
    dimensions = "".join(
        f"<dimension {_attributes({'sizeX': width, 'sizeY': height, 'r': number, 'ifd': first + number})}/>"
        for number, (height, width) in enumerate(sizes)
    )
    whole = {"sizeX": sizes[0][1], "sizeY": sizes[0][0]}
    return (
        f'<image name="{name}"><creationDate>2000-01-01T00:00:00Z</creationDate><device model="phantom" version="1"/>'
        f"<pixels {_attributes(whole)}>{dimensions}</pixels><view {_attributes(view)}/><scanSettings>"
        "<objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings><numericalAperture>0.4"
        "</numericalAperture><illuminationSource>brightfield</illuminationSource></illuminationSettings>"
        "</scanSettings></image>"
    )


def _attributes(values: dict[str, int]) -> str:
    return " ".join(f'{name}="{value}"' for name, value in values.items())
