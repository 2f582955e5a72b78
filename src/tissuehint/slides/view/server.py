"""The local server of the viewer."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tissuehint.errors import InputError
from tissuehint.slides.view.cache import Cache
from tissuehint.slides.view.class_map import png
from tissuehint.slides.view.collection import Collection
from tissuehint.slides.view.describe import card, details
from tissuehint.slides.view.guard import LocalOnly
from tissuehint.slides.view.opened import OpenedMap
from tissuehint.slides.view.pixels import jpeg, shrunk
from tissuehint.slides.view.pyramid import Tile
from tissuehint.slides.view.record import PICTURES, SlideRecord

ADDRESS = "127.0.0.1"
SLIDE_THREADS = 4  # each has handles of its own on the slides that are open
KEPT_TILES = 96 * 2**20  # bytes of JPEG tiles
CARD_SIDE = 480  # px, of the pictures in the list

STATIC = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "viewer.js": "text/javascript",
    "scale.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "openseadragon.min.js": "text/javascript",
}


class Viewer:
    """Answers the page's requests.

    Args:
        collection: the opened folder.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self._tiles: Cache[bytes] = Cache(KEPT_TILES, len)
        self._slides = ThreadPoolExecutor(SLIDE_THREADS, thread_name_prefix="slide")
        # maps and records must not wait behind a slow slide
        self._maps = ThreadPoolExecutor(SLIDE_THREADS, thread_name_prefix="map")

    def app(self, port: int) -> Starlette:
        """The application, for a server on ``port``."""
        slides, maps = self._slides, self._maps
        routes = [
            Route("/", _page),
            Route("/static/{name}", _static),
            Route("/api/slides", _threaded(maps, self.listed)),
            Route("/api/slides/{key}", _threaded(slides, self.described)),
            Route("/api/slides/{key}/at", _threaded(maps, self.at)),
            Route("/slides/{key}/{picture}", _threaded(maps, self.picture)),
            Route("/slides/{key}/slide/{level:int}/{column:int}_{row:int}.jpg", _threaded(slides, self.slide_tile)),
            Route("/slides/{key}/classes/{level:int}/{column:int}_{row:int}.png", _threaded(maps, self.class_tile)),
        ]
        handlers: dict[Any, Callable[[Request, Exception], Response]] = {InputError: _unreadable, OSError: _unreadable}
        return Starlette(routes=routes, middleware=[Middleware(LocalOnly, port=port)], exception_handlers=handlers)

    def close(self) -> None:
        """Let waiting reads go."""
        for pool in (self._slides, self._maps):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- answers, each in a thread --------------------------------------------------------------------------------

    def listed(self, request: Request) -> Response:
        """All slides, as they are now."""
        return JSONResponse({"folder": self.collection.root.name, "slides": [*map(card, self.collection.scan())]})

    def described(self, request: Request) -> Response:
        """Everything about one finished slide."""
        return JSONResponse(details(self._opened(request)))

    def picture(self, request: Request) -> Response:
        """``thumbnail.jpg`` or ``overlay.jpg`` in the size of the list."""
        record, name = self._record(request), request.path_params["picture"]
        path = record.file(name) if name in PICTURES else None
        if path is None:
            raise HTTPException(404)
        try:
            geometry = record.geometry
            aspect = None if geometry is None else geometry.height / geometry.width
            return Response(shrunk(path, CARD_SIDE, aspect), media_type="image/jpeg")
        except (ValueError, SyntaxError) as error:
            raise InputError(path, f"cannot be read ({error})", "predict this slide again") from None

    def slide_tile(self, request: Request) -> Response:
        """A tile of the slide."""
        opened = self._opened(request)
        tile = self._tile(request, opened)

        def read() -> bytes:
            pixels = opened.pixels.tile(tile)
            if pixels is None:
                raise HTTPException(404)
            return jpeg(pixels)

        key = (opened.record.key, opened.record.version, tile)
        return Response(self._tiles.get(key, read), media_type="image/jpeg")

    def class_tile(self, request: Request) -> Response:
        """A tile of the class map; ``?classes=0,2`` paints these classes only."""
        opened = self._opened(request)
        labels = opened.geometry.labels
        chosen = request.query_params.get("classes")
        try:
            shown = {*range(labels.num_tissue)} if chosen is None else {int(part) for part in chosen.split(",") if part}
        except ValueError:
            raise HTTPException(400, "classes are numbers, as in classes=0,2") from None
        classes = opened.classes.tile(self._tile(request, opened))
        return Response(png(classes, labels, shown), media_type="image/png")

    def at(self, request: Request) -> Response:
        """Class and probabilities at ``?x=&y=``, level-0 pixels."""
        opened = self._opened(request)
        try:
            x, y = (float(request.query_params[name]) for name in ("x", "y"))
        except (KeyError, ValueError):
            raise HTTPException(400, "x and y are numbers") from None
        if not (math.isfinite(x) and math.isfinite(y)):
            raise HTTPException(400, "x and y are numbers")
        geometry = opened.geometry
        index = opened.classes.at(y, x)
        row, column = geometry.placement.to_map(y, x)
        found = opened.probabilities
        shares = None if found is None else found.at(math.floor(row), math.floor(column))
        name = geometry.labels.names[index] if index < geometry.labels.num_classes else None
        return JSONResponse({"class": None if name is None else index, "name": name, "probabilities": shares})

    # ---- what a request names -------------------------------------------------------------------------------------

    def _record(self, request: Request) -> SlideRecord:
        """The slide of a request, looked up among those that were found: a name never becomes a path."""
        record = self.collection.record(request.path_params["key"])
        if record is None:
            raise HTTPException(404)
        return record

    def _opened(self, request: Request) -> OpenedMap:
        record = self._record(request)
        if record.state != "done":
            raise HTTPException(404, f"{record.name} has no map: {record.error or record.state}")
        return self.collection.opened(record)

    def _tile(self, request: Request, opened: OpenedMap) -> Tile:
        names = request.path_params
        tile = opened.pyramid.tile(names["level"], names["row"], names["column"])
        if tile is None:
            raise HTTPException(404)
        return tile


def bind(port: int) -> socket.socket:
    """A socket that listens on this computer only.

    Args:
        port: 0 takes a free one.

    Raises:
        InputError: a port that is in use or not allowed.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere this option would share the port with another program
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        rule = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise InputError(f"--port {port}", rule, "give another port, or none for a free one") from None
    return listener


def address(listener: socket.socket) -> str:
    """Of the page."""
    return f"http://{ADDRESS}:{listener.getsockname()[1]}/"


def make_server(viewer: Viewer, listener: socket.socket) -> uvicorn.Server:
    """The server; ``run(sockets=[listener])`` serves until it is interrupted, or ``should_exit`` is set."""
    config = uvicorn.Config(
        viewer.app(listener.getsockname()[1]),
        log_level="error",
        access_log=False,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def serve(viewer: Viewer, listener: socket.socket) -> None:
    """Serve until Ctrl-C."""
    try:
        make_server(viewer, listener).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn closes its connections first and then raises it again
        pass
    finally:
        viewer.close()
        listener.close()


def _threaded(pool: ThreadPoolExecutor, work: Callable[[Request], Response]) -> Callable[[Request], Any]:
    """An endpoint that does its work in a thread of a pool."""

    async def endpoint(request: Request) -> Response:
        return await asyncio.get_running_loop().run_in_executor(pool, work, request)

    return endpoint


async def _page(request: Request) -> Response:
    return Response(_packaged("page.html"), media_type="text/html")


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in STATIC:
        raise HTTPException(404)
    return Response(_packaged(name), media_type=STATIC[name])


def _packaged(name: str) -> bytes:
    folder = resources.files("tissuehint.slides.view")
    if name.startswith("openseadragon"):
        folder = folder / "openseadragon"
    return (folder / name).read_bytes()


def _unreadable(request: Request, error: Exception) -> Response:
    """A file that is damaged, gone, or cannot be read: the page goes on without it."""
    return PlainTextResponse(" ".join(str(error).split()) + "\n", 500)
