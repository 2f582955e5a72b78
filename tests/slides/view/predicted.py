"""Folders as ``tissuehint predict`` leaves them, and a server over them; everything is small."""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
import zarr
from PIL import Image

from tissuehint.labels import LabelSpace
from tissuehint.slides.coordinates import Placement
from tissuehint.slides.view.collection import Collection
from tissuehint.slides.view.server import Viewer, bind, make_server

LABELS = LabelSpace(("tumour", "stroma", "white"), ((200, 30, 40), (20, 90, 200), (255, 255, 255)), white=2)
TUMOUR, STROMA, WHITE, IGNORE = 0, 1, 2, 255
HEIGHT, WIDTH, UM = 700, 1100, 0.5
GROUND, MARK = (210, 180, 200), (20, 160, 60)
#: On the slide, where both the slide and the map are marked; level-0 px, whole at every level of the pyramid.
SQUARE = {"top": 256, "left": 512, "height": 128, "width": 256}
#: A map pixel is 3.2 of the slide and the corner lies inside, yet the square begins and ends with 8 map pixels.
PLACEMENT = Placement(um_per_px=1.6, scale=3.2, top=51.2, left=51.2)
MAP_HEIGHT, MAP_WIDTH = 190, 300


def write_slide(path: Path) -> Path:
    """A slide of two colours: the square is marked."""
    pixels = np.full((HEIGHT, WIDTH, 3), GROUND, np.uint8)
    rows, columns = square()
    pixels[rows, columns] = MARK
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def square(step: float = 1) -> tuple[slice, slice]:
    """Rows and columns of the square in a picture of ``step`` level-0 px a pixel."""
    top, left = SQUARE["top"] / step, SQUARE["left"] / step
    return (
        slice(round(top), round(top + SQUARE["height"] / step)),
        slice(round(left), round(left + SQUARE["width"] / step)),
    )


def marked_map(placement: Placement = PLACEMENT, height: int = MAP_HEIGHT, width: int = MAP_WIDTH) -> np.ndarray:
    """(H,W) stroma with a square of tumour, a row of white below, and ignore at the right border."""
    classes = np.full((height, width), STROMA, np.uint8)
    top, left = placement.to_map(float(SQUARE["top"]), float(SQUARE["left"]))
    bottom = round(top + SQUARE["height"] / placement.scale)
    right = round(left + SQUARE["width"] / placement.scale)
    classes[round(top) : bottom, round(left) : right] = TUMOUR
    classes[-24:] = WHITE
    classes[:, -32:] = IGNORE
    return classes


def write_pyramid(path: Path, classes: np.ndarray, *, tile: int = 64, smallest: int = 32, factor: int = 2) -> None:
    """A tiled TIFF, each sub-image made of every ``factor``-th pixel."""
    levels = [classes]
    while max(levels[-1].shape) > smallest:
        levels.append(levels[-1][::factor, ::factor])
    with tifffile.TiffWriter(path) as file:
        for index, level in enumerate(levels):
            file.write(
                level,
                tile=(tile, tile),
                compression="zlib",
                photometric="minisblack",
                subifds=len(levels) - 1 if index == 0 else None,
                subfiletype=int(index > 0),
                metadata=None,
            )


def write_probabilities(path: Path, shares: np.ndarray) -> None:
    """A sharded zarr array, as predict writes it."""
    kinds = len(shares)
    array = zarr.create_array(
        str(path), shape=shares.shape, chunks=(kinds, 50, 50), shards=(kinds, 200, 200), dtype="uint8", fill_value=0
    )
    array[:] = shares


def write_map(
    folder: Path,
    file: Path,
    *,
    classes: np.ndarray | None = None,
    placement: Placement = PLACEMENT,
    probabilities: np.ndarray | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **changes: object,
) -> Path:
    """The folder of a finished slide; ``changes`` replace entries of its record."""
    folder.mkdir(parents=True)
    classes = marked_map(placement) if classes is None else classes
    write_pyramid(folder / "classes.ome.tif", classes)
    if probabilities is not None:
        write_probabilities(folder / "probabilities.zarr", probabilities)
    if file.is_file():
        with Image.open(file) as picture:
            small = picture.convert("RGB").reduce(4)
        small.save(folder / "thumbnail.jpg", quality=95)
        with_legend = Image.new("RGB", (small.width, small.height + 60))
        with_legend.paste(small)
        with_legend.save(folder / "overlay.jpg", quality=95)
    counts = np.bincount(classes.reshape(-1), minlength=256)[: LABELS.num_classes]
    with (folder / "areas.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["class", "pixels", "mm2", "percent_of_tissue"])
        for index, (name, count) in enumerate(zip(LABELS.names, counts, strict=True)):
            share = 100 * count / max(1, counts[: LABELS.num_tissue].sum()) if index < LABELS.num_tissue else ""
            writer.writerow([name, count, count * placement.um_per_px**2 / 1e6, share])
    record = {
        "format": 1,
        "name": folder.name,
        "state": "done",
        "attempts": 1,
        "slide": {
            "path": str(file.resolve()),
            "bytes": file.stat().st_size if file.is_file() else 1,
            "height": size[0],
            "width": size[1],
            "um_per_px": UM,
            "bounds": [0, 0, *size],
        },
        "map": {"height": len(classes), "width": classes.shape[1], **placement.__dict__},
        "labels": LABELS.to_dict(),
        "model": {"path": "/runs/pbip-seed0/model"},
        "error": None,
        **changes,
    }
    (folder / "slide.json").write_text(json.dumps(record))
    return folder


def shares_of(classes: np.ndarray) -> np.ndarray:
    """(K,H,W) uint8 probabilities that differ from pixel to pixel; 0 where nothing was mapped."""
    rows, columns = np.indices(classes.shape)
    first = (rows * 7 + columns * 3) % 200
    shares = np.stack([first, 255 - first, np.zeros_like(first)]).astype(np.uint8)
    shares[:, classes == IGNORE] = 0
    return shares


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict:
        assert self.status == 200, self
        return json.loads(self.body)


@dataclass
class Running:
    """A server that listens; paths are sent as they are."""

    port: int
    collection: Collection

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, *, method: str = "GET", **headers: str) -> Answer:
        """Ask; ``host=`` replaces the Host header, "" leaves it out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        host = headers.pop("host", f"127.0.0.1:{self.port}")
        for name, value in {**({"Host": host} if host else {}), **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, body)


@contextlib.contextmanager
def running(root: Path, *slides: Path) -> Iterator[Running]:
    """Serve a folder on a free port."""
    collection = Collection(root, slides)
    listener = bind(0)
    viewer = Viewer(collection)
    server = make_server(viewer, listener)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(listener.getsockname()[1], collection)
    finally:
        server.should_exit = True
        thread.join(10)
        viewer.close()
        listener.close()
