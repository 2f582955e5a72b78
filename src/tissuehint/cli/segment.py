"""``tissuehint segment``: one image and a few points in, its mask out, without any training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tissuehint.cli.predict import OVERLAY_SIDE, area_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from tissuehint.labels import LabelSpace, Points
    from tissuehint.methods.cvm.segment import Segmentation
    from tissuehint.nn.encoders import Encoder

PICTURES = (".png", ".jpg", ".jpeg")
POINT_RADIUS = 1 / 120  # of the shorter side of the overlay
REST = "rest"
TINT = 0.3


class Rule(StrEnum):
    """How contrast maps become a solution (``methods.cvm.segment``)."""

    DIFFERENCE = "difference"
    PER_POINT = "per-point"


class Normalization(StrEnum):
    """Which normalisation the weights of an encoder were trained with."""

    IMAGENET = "imagenet"
    INCEPTION = "inception"
    UNIT = "unit"


def segment(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image.")],
    points: Annotated[
        Path, typer.Option(metavar="FILE", help="Its points: CSV with row,column,class, or GeoJSON of QuPath.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="The mask. [default: NAME_mask.png in this folder]")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Image, mask and points, PNG or JPEG.")
    ] = None,
    soft: Annotated[Path | None, typer.Option(metavar="NPZ", help="Class probabilities, as predict --soft.")] = None,
    target: Annotated[str | None, typer.Option(metavar="CLASS", help="Take all other classes as one, 'rest'.")] = None,
    rule: Annotated[
        Rule, typer.Option(help="difference: one problem of all points; per-point: one per point, Eq. 6 and 7 of CVM.")
    ] = Rule.DIFFERENCE,
    eta: Annotated[float, typer.Option(help="Weight of the other classes' points in a contrast map, 0..1.")] = 0.6,
    data_weight: Annotated[
        float | None,
        typer.Option(help="Larger keeps finer parts. [default: 1 for difference, 3 for per-point]", min=0),
    ] = None,
    side: Annotated[
        int, typer.Option(help="Longest side, px, at which the image is looked at; results have its own size.", min=1)
    ] = 512,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare maps of this backbone, too; needs --weights.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="PATH|hub", help="Weights of the encoder: a file, or hub to download.")
    ] = None,
    normalization: Annotated[
        Normalization, typer.Option(help="That of the encoder's weights.")
    ] = Normalization.IMAGENET,
) -> None:
    """Segment one image from a few points.

    Mark a few points of each class (three to five, on its different looks) and get the mask of the image: values are
    classes in the order in which the points file names them first. Nothing is trained and no weights are needed: stains
    are compared, with --encoder its maps, too. Files of an earlier call are replaced.
    """
    from tissuehint.cli.output import say
    from tissuehint.data.point_file import read_point_file
    from tissuehint.data.records import read_image
    from tissuehint.methods.cvm.segment import segment_image

    files = Outputs(out if out is not None else Path(f"{image.stem}_mask.png"), overlay, soft)
    files.check((image, points))
    pixels = read_image(image)
    clicks, labels = read_point_file(points, (pixels.shape[0], pixels.shape[1]))
    if target is not None:
        clicks, labels = against_the_rest(clicks, labels, target)
    backbone = _encoder(encoder, weights, normalization)
    began = time.perf_counter()
    found = segment_image(
        pixels, clicks, labels, encoder=backbone, side=side, eta=eta, rule=rule.value, data_weight=data_weight
    )
    seconds = time.perf_counter() - began
    files.write(pixels, clicks, labels, found)
    for _, name, count, share, _ in area_rows(str(image), found.mask, labels, None):
        say(f"{name}: {count} px, {float(share):.1f} %")
    say(f"{len(clicks)} points, {seconds:.2f} s: {', '.join(str(path) for path in files.paths)}")


@dataclass(frozen=True)
class Outputs:
    """Files that are asked for."""

    mask: Path
    overlay: Path | None
    soft: Path | None

    @property
    def paths(self) -> list[Path]:
        """All of them, the mask last: where it is, the others are."""
        return [path for path in (self.overlay, self.soft, self.mask) if path is not None]

    def check(self, inputs: Sequence[Path]) -> None:
        """Refuse before any work what would be written in a wrong format, or over something else.

        Raises:
            InputError: a suffix of another format, two results in one file, a result in the place of an input.
        """
        from tissuehint.errors import InputError

        formats = (
            ("--out", self.mask, (".png",)),
            ("--overlay", self.overlay, PICTURES),
            ("--soft", self.soft, (".npz",)),
        )
        for option, path, suffixes in formats:
            if path is not None and path.suffix.lower() not in suffixes:
                raise InputError(f"{option} {path}", f"does not end in {' or '.join(suffixes)}", "rename it")
        taken = {path.resolve(): "replace an input" for path in inputs}
        for path in self.paths:
            if path.resolve() in taken:
                raise InputError(path, f"would {taken[path.resolve()]}", "give another name")
            taken[path.resolve()] = "hold two results"

    def write(self, image: NDArray[Any], points: Points, labels: LabelSpace, found: Segmentation) -> None:
        """All files, each whole or absent."""
        import numpy as np

        from tissuehint.files import atomic_path, write_palette_png

        if self.overlay is not None:
            picture = draw(image, found.mask, points, labels)
            with atomic_path(self.overlay) as part:
                if part.suffix.lower() == ".png":
                    picture.save(part, format="PNG")
                else:
                    picture.save(part, format="JPEG", quality=90)
        if self.soft is not None:
            with atomic_path(self.soft) as part:
                probabilities = found.tissue_map.numpy().astype(np.float16)
                np.savez_compressed(part, probabilities=probabilities, classes=np.array(labels.names))
        write_palette_png(self.mask, found.mask, labels.palette())


def against_the_rest(points: Points, labels: LabelSpace, target: str) -> tuple[Points, LabelSpace]:
    """Points and classes where all but the target are one class: ``rest`` 0, the target 1.

    Raises:
        InputError: a target without points.
    """
    from tissuehint.errors import InputError
    from tissuehint.labels import LabelSpace, Points

    if target not in labels.names:
        raise InputError(
            f"--target {target}", f"has no points, classes are {', '.join(labels.names)}", "use one of them"
        )
    rows = points.rows.copy()
    rows[:, 2] = rows[:, 2] == labels.index(target)
    # a target of that name keeps its own
    return Points(rows), LabelSpace((REST if target != REST else f"not {REST}", target))


def draw(image: NDArray[Any], mask: NDArray[Any], points: Points, labels: LabelSpace) -> Image.Image:
    """The image with the classes' colours laid over it, white borders between them, and the points in their colours.

    Larger pictures are shrunk: they are looked at, not measured.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    height, width = mask.shape
    factor = min(1.0, OVERLAY_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    shown = np.asarray(Image.fromarray(image).resize(size))
    small = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    colours = labels.colour_table()[small].astype(np.float32)
    mixed = ((1 - TINT) * shown + TINT * colours + 0.5).astype(np.uint8)
    border = np.zeros(small.shape, bool)
    border[:-1] |= small[1:] != small[:-1]
    border[1:] |= small[1:] != small[:-1]
    border[:, :-1] |= small[:, 1:] != small[:, :-1]
    border[:, 1:] |= small[:, 1:] != small[:, :-1]
    mixed[border] = 255
    picture = Image.fromarray(mixed)
    pen, radius = ImageDraw.Draw(picture), max(2, round(min(size) * POINT_RADIUS))
    for row, column, label in points.rows.tolist():
        x, y = (column + 0.5) * factor, (row + 0.5) * factor
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, fill=labels.colours[label], outline=(255, 255, 255), width=max(1, radius // 3))
    return picture


def _encoder(name: str | None, weights: str | None, normalization: Normalization) -> Encoder | None:
    from tissuehint.errors import InputError

    if name is None and weights is not None:
        raise InputError(f"--weights {weights}", "have no network to go into", "give --encoder NAME, too")
    if name is None:
        return None
    if weights in (None, "none"):
        raise InputError(
            f"--encoder {name}", "has no weights, and nothing is trained here", "give --weights PATH, or hub"
        )
    from tissuehint.nn.config import EncoderConfig
    from tissuehint.nn.encoders import build_encoder

    config = EncoderConfig(name=name, weights=str(weights), normalization=normalization.value)
    return build_encoder(config)
