"""The frame of a page: head, style, script, and a policy that forbids every request that it does not need."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources

from tissuehint.report.markup import Markup, tag


def document(title: str, body: Markup, script: str, *, pictures: str = "data:", footer: str | None = None) -> str:
    """A whole page as text.

    Args:
        title: of the window.
        body: all but the footer.
        script: name of the script that comes with this package; the dark page and the order of tables have their own.
        pictures: where pictures may come from, as in a content security policy.
        footer: what stands below; None says that the page is one file.
    """
    style, code = packaged("page.css"), "".join(map(packaged, ("theme.js", "tables.js", script)))
    # names in user data can never run: no script but this one may
    digest = base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; img-src {pictures}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    if footer is None:
        size = (len(body.encode("utf-8")) + len(head.encode("utf-8")) + len(code)) / 1e6
        footer = f"This page is one file of {size:.1f} MB and asks the network for nothing."
    below = tag("footer", tag("p", footer))
    page = tag("html", head, tag("body", body, below, tag("script", Markup(code))), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def packaged(name: str) -> str:
    """Text of a file of this package."""
    return resources.files("tissuehint.report").joinpath(name).read_text(encoding="utf-8")
