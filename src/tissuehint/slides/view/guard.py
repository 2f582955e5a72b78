"""What the server answers at all: requests of the page that it gave out, and no others."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost", "[::1]")
METHODS = ("GET", "HEAD")

#: Of the one style that OpenSeadragon adds to the page itself.
OWN_STYLE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"

HEADERS = {
    # the page can ask nothing but this server, whatever stands in the data
    "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src 'self' {OWN_STYLE}; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    # slides of patients stay out of the browser's files
    "Cache-Control": "no-store",
}


class LocalOnly:
    """Refuses what another site could send through the user's browser, and adds the headers above.

    * A ``Host`` that is not this computer's own name with the server's port: a site may point its own name at 127.0.0.1
      and read the answers as its own.
    * Methods other than GET and HEAD.
    * Requests that the browser marks as another site's; a link to the page itself may stand anywhere.

    Args:
        app: what is guarded.
        port: that the server listens on.
    """

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.hosts = {f"{host}:{port}" for host in HOSTS} | (set(HOSTS) if port == 80 else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(scope)
        await (self.app if refusal is None else refusal)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return PlainTextResponse("This address is not the viewer's.\n", 403)
        if scope["method"] not in METHODS:
            return PlainTextResponse("Only GET.\n", 405, {"Allow": ", ".join(METHODS)})
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not (
            scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        ):
            return PlainTextResponse("Not for other sites.\n", 403)
        return None
