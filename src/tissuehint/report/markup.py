"""HTML by construction: every string is escaped unless it is already ``Markup``."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_VOID = frozenset({"br", "img", "input", "meta"})


class Markup(str):
    """Text that is HTML already and is not escaped again."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value as HTML text; ``Markup`` stays as it is.

    Example:
        >>> text("<b>")
        '&lt;b&gt;'
    """
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    """Escape and join parts; None is left out."""
    return Markup(separator.join(text(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element.

    Args:
        name: element name.
        children: contents, escaped unless ``Markup``; None is left out.
        attributes: values are escaped; None and False leave an attribute out, True writes its bare name. A trailing
            underscore is dropped and inner ones become hyphens (``class_``, ``aria_label``).

    Example:
        >>> tag("td", "a < b", class_="number", hidden=True)
        '<td class="number" hidden>a &lt; b</td>'
    """
    opening = "".join(
        f" {_attribute(key)}" if value is True else f' {_attribute(key)}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{opening}>")
    return Markup(f"<{name}{opening}>{join(children)}</{name}>")


def _attribute(key: str) -> str:
    # viewBox and other SVG names have no underscore, so they pass unchanged
    return key.rstrip("_").replace("_", "-")
