"""Polygons of a class map: time against plain polygonising, errors of area and shape, and memory at two sizes.

    OMP_NUM_THREADS=1 uv run --no-sync python benchmarks/polygons.py [--side 12288] [--memory-sides 20000 40000]

The map is smooth random tissue of four classes and unmapped pixels. Rows, in processor time: the whole array through
rasterio.features.shapes, made into shapely polygons; the blocks of tissue_polygons, exact and simplified. Area error:
the sum over the classes of |area - pixels|, over the pixels. Memory: the most that a process has above what it has
after its imports, with a map that is made while it is read; once where regions are small, once where one region
reaches all over the slide and encloses most others. Exits with code 1 where a polygon is invalid, an exact area is
off, or the blocks take more than 10 times the plain time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.features
import scipy.ndimage
import shapely
from numpy.typing import NDArray

from tissuehint.labels import LabelSpace
from tissuehint.slides.export.polygons import TissuePolygon, tissue_polygons

LABELS = LabelSpace(("stroma", "gland", "necrosis", "immune"))
PERIOD, CELL = 4096, 128  # px
EXCESS = {"regions": 0.7, "one all over the slide": 1.3}
SLOWEST = 10.0


class Texture:
    """(side, side) class map, made of one period, (PERIOD, PERIOD), while it is read."""

    def __init__(self, side: int, period: NDArray[np.uint8]) -> None:
        self.shape, self.chunks = (side, side), (1024, 1024)
        self._period = period

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[np.uint8]:
        rows, columns = (np.arange(part.start, part.stop) % PERIOD for part in key)
        return self._period[np.ix_(rows, columns)]


def period(excess: float) -> NDArray[np.uint8]:
    """Tissue whose first class has this much more of a chance; above 1 it reaches all over the slide."""
    generator = np.random.default_rng(0)
    count = len(LABELS.names) + 1
    fields = generator.standard_normal((count, PERIOD // CELL, PERIOD // CELL)).astype(np.float32)
    best = np.full((PERIOD, PERIOD), -np.inf, np.float32)
    found = np.zeros((PERIOD, PERIOD), np.uint8)
    for index, field in enumerate(fields):
        smooth = scipy.ndimage.zoom(field, CELL, order=3, mode="grid-wrap", grid_mode=True)
        smooth += 0.03 * generator.standard_normal(smooth.shape).astype(np.float32) + (excess if index == 0 else 0)
        found[smooth > best] = LABELS.ignore if index == count - 1 else index
        best = np.maximum(best, smooth)
    # what a network gives is smooth at the scale of its stride
    return scipy.ndimage.median_filter(found, 7, mode="wrap")


def plain(classes: NDArray[np.uint8]) -> list[TissuePolygon]:
    found = rasterio.features.shapes(classes, mask=classes < LABELS.num_tissue, connectivity=4)
    return [TissuePolygon(shapely.geometry.shape(shape), int(value)) for shape, value in found]


def area_error(polygons: Iterable[TissuePolygon], pixels: NDArray[np.int64]) -> float:
    areas = np.zeros(len(pixels))
    for polygon in polygons:
        areas[polygon.label] += polygon.geometry.area
    return float(np.abs(areas - pixels).sum() / pixels.sum())


def timed(call: Callable[[], Iterable[TissuePolygon]]) -> tuple[float, list[TissuePolygon]]:
    start = time.process_time()
    found = list(call())
    return time.process_time() - start, found


def highest() -> float:
    """MB that this process has had at most; ``ru_maxrss`` would count its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def peak(side: int, file: str) -> None:
    """Print the memory above the imports and the map, in MB, seconds, and what was found; runs in its own process."""
    classes = Texture(side, np.load(file))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = highest()
    start, count, largest = time.process_time(), 0, 0
    for polygon in tissue_polygons(classes, LABELS):
        count += 1
        largest = max(largest, int(shapely.get_num_coordinates(polygon.geometry)))
    seconds = time.process_time() - start
    after = highest()
    print(f"{after - before:10.0f}{seconds:10.1f}{count:11}{largest:12} vertices")


def memory(sides: Sequence[int]) -> None:
    print(f"{'':24}{'side':>7}{'peak MB':>10}{'seconds':>10}{'polygons':>11}{'largest':>12}")
    for name, excess in EXCESS.items():
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            np.save(file.name, period(excess))
            for side in sides:
                print(f"{name:24}{side:7}", end="", flush=True)
                subprocess.run([sys.executable, __file__, "--peak", str(side), file.name], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=12288)
    parser.add_argument("--memory-sides", type=int, nargs="*", default=[20_000, 40_000])
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        peak(int(arguments.peak[0]), arguments.peak[1])
        return 0
    whole = Texture(arguments.side, period(EXCESS["regions"]))[0 : arguments.side, 0 : arguments.side]
    pixels = np.bincount(whole.reshape(-1), minlength=256)[: LABELS.num_tissue]
    exact: dict[str, Any] = {"tolerance": 0, "min_area": 0}
    ways: dict[str, Callable[[], Iterable[TissuePolygon]]] = {
        "rasterio.features.shapes": lambda: plain(whole),
        "tissue_polygons, exact": lambda: tissue_polygons(whole, LABELS, **exact),
        "tissue_polygons, simplified": lambda: tissue_polygons(whole, LABELS, min_area=0),
        "tissue_polygons, as by default": lambda: tissue_polygons(whole, LABELS),
    }
    print(f"{arguments.side} x {arguments.side} px, shapely {shapely.__version__}, GEOS {shapely.geos_version_string}")
    print(f"{'':32}{'polygons':>9}{'vertices':>10}{'seconds':>9}{'ratio':>7}{'invalid':>9}{'area':>10}")
    within, unit = True, 0.0
    for name, way in ways.items():
        seconds, found = timed(way)
        unit = unit or seconds
        geometries = np.array([polygon.geometry for polygon in found], object)
        invalid = int((~shapely.is_valid(geometries)).sum())
        error = area_error(found, pixels)
        vertices = shapely.get_num_coordinates(geometries).sum()
        row = f"{name:32}{len(found):9}{vertices:10}{seconds:9.2f}{seconds / unit:7.2f}{invalid:9}"
        print(f"{row}{100 * error:8.4f} %", flush=True)
        if name.startswith("tissue"):
            within &= invalid == 0 and seconds < SLOWEST * unit and (error == 0 or "exact" not in name)
    print(f"valid, exact, and below {SLOWEST:.0f} times the plain way: {'yes' if within else 'NO'}")
    memory(arguments.memory_sides)
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
