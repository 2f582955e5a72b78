"""The pictures of a run as data URIs: each image beside its truth and the maps of the run."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tissuehint.labels import LabelSpace
from tissuehint.report.markup import Markup, join, tag
from tissuehint.report.record import GalleryItem, RunRecord
from tissuehint.report.scores import PROTOCOLS, colour_style, decimal

if TYPE_CHECKING:
    from PIL.Image import Image

LONG_SIDE = 320  # pixels of the longer side of a picture on the page
JPEG_QUALITY = 85
OPACITY = 55  # per cent, at the start
LAYER_TITLES = {
    "image": "image",
    "truth": "truth",
    "tissue_map": "tissue map (stage 1)",
    "pseudo_mask": "pseudo mask (oracle)",  # made with the image's own tags, also where it is a test image
    "prediction": "prediction",
}
MASKS = frozenset({"truth", "pseudo_mask", "prediction"})
# what Pillow raises for files that are missing, damaged or absurdly large
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
_FIRST_SHOWN = ("prediction", "tissue_map", "pseudo_mask", "truth")


def gallery(record: RunRecord) -> Markup:
    """Controls, legend and one row per image."""
    if not record.gallery:
        return tag("p", "This run has no gallery yet.", class_="missing")
    layers = layer_order(record.gallery)
    shown = next((layer for layer in _FIRST_SHOWN if layer in layers), layers[-1])
    items = [_item(item, index, record, layers) for index, item in enumerate(record.gallery)]
    choice, slider = _layer_choice(layers, shown, "layer"), _slider("opacity", "Opacity, all images")
    controls = tag("div", choice, slider, _order(), class_="controls")
    plain = tag("noscript", tag("p", "Without JavaScript the layers stand side by side and are not overlaid."))
    rows = tag("div", *items, class_="items", data_shown=shown)
    return join([plain, controls, legend(record.labels), rows, _enlarged(layers, shown, record.labels)])


def layer_order(items: Sequence[GalleryItem]) -> list[str]:
    """All layers of the gallery: the known ones in the order of a run, then others in order of appearance."""
    found = dict.fromkeys(layer for item in items for layer in item.layers)
    return [layer for layer in LAYER_TITLES if layer in found] + [layer for layer in found if layer not in LAYER_TITLES]


def legend(labels: LabelSpace | None) -> Markup:
    """Colour and name of each class."""
    if labels is None:
        return tag("p", "Class names and colours are not known: they come with the scores.", class_="missing")
    keys = [
        tag("li", tag("span", class_="swatch", style=colour_style(labels, name)), name, _white(labels, name))
        for name in labels.names
    ]
    keys.append(tag("li", tag("span", class_="swatch", style="--class: rgb(128 128 128)"), "not labelled (ignored)"))
    return tag("ul", *keys, class_="legend", aria_label="Classes")


def data_uri(path: Path, mask: bool, labels: LabelSpace | None, long_side: int = LONG_SIDE) -> tuple[str, int, int]:
    """A picture as data URI and its width and height, at most ``long_side`` pixels long.

    Every picture is encoded anew, so that no metadata of the original (a patient's name in EXIF, say) comes along.
    Class masks keep their palette and are never blended; other pictures become JPEG.

    Raises:
        OSError: no such file, or no picture.
        ValueError: more pixels than Pillow accepts.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.load()
            picture: Image.Image = opened
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    indexed = mask and picture.mode in ("P", "L", "1")
    if indexed and picture.mode != "P" and labels is not None:
        picture = _coloured(picture, labels)
    picture = _fitted(picture if indexed else picture.convert("RGB"), long_side, smooth=not indexed)
    buffer = io.BytesIO()
    if indexed:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, optimize=True)
    code = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{'png' if indexed else 'jpeg'};base64,{code}", picture.width, picture.height


def _fitted(picture: Image, long_side: int, smooth: bool) -> Image:
    from PIL import Image as Images

    scale = long_side / max(picture.size)
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Images.Resampling.LANCZOS if smooth else Images.Resampling.NEAREST)
    return picture


def _coloured(picture: Image, labels: LabelSpace) -> Image:
    """A mask of bare class indices with the palette of the label space."""
    from PIL import Image as Images

    indices = picture.convert("L") if picture.mode == "L" else picture.point(lambda bit: int(bit > 0), "L")
    coloured = Images.frombytes("P", indices.size, indices.tobytes())
    coloured.putpalette(labels.palette())
    return coloured


def _item(item: GalleryItem, index: int, record: RunRecord, layers: Sequence[str]) -> Markup:
    figures, lost = [], []
    for layer in layers:
        if layer not in item.layers:
            continue
        try:
            figures.append(_figure(item, layer, record))
        except UNREADABLE as error:
            lost.append(f"{layer_title(layer)} ({item.layers[layer]}) cannot be shown: {_reason(error)}")
    heading = f"image-{index}"
    told = f"mIoU {decimal(item.miou)}{_protocol(record)}"
    score = tag("span", told, class_="chip") if math.isfinite(item.miou) else None
    split = tag("span", item.split, class_="chip") if item.split else None
    head = tag("div", tag("h3", item.id, id=heading), split, score, class_="item-head")
    viewer = tag(
        "div",
        tag("button", type="button", class_="stack", aria_label=f"Enlarge {item.id}"),
        _slider(f"opacity-{index}", "Opacity"),
        class_="viewer",
        hidden=True,
    )
    warnings = [tag("p", f"{told}.", class_="warning") for told in lost]
    body = tag("div", viewer, tag("div", *figures, class_="strip"), class_="item-body")
    attributes = {"data_miou": repr(item.miou) if math.isfinite(item.miou) else None, "data_position": index}
    return tag("article", head, *warnings, body, class_="item", aria_labelledby=heading, **attributes)


def _figure(item: GalleryItem, layer: str, record: RunRecord) -> Markup:
    folder = (record.folder / "gallery").resolve()
    path = (folder / item.layers[layer]).resolve()
    if not path.is_relative_to(folder):
        raise OSError("it lies outside the gallery folder")
    uri, width, height = data_uri(path, layer in MASKS, record.labels)
    title = layer_title(layer)
    picture = tag("img", src=uri, alt=f"{title} of {item.id}", width=width, height=height, decoding="async")
    kind = "mask" if uri.startswith("data:image/png") else "picture"
    button = tag("button", picture, type="button", class_=f"layer {kind}", aria_pressed="false")
    return tag("figure", button, tag("figcaption", title), data_layer=layer)


def layer_title(layer: str) -> str:
    """Words for a layer."""
    return LAYER_TITLES.get(layer, layer.replace("_", " "))


def _reason(error: Exception) -> str:
    """Why a picture is not shown, without the path of this machine that the error may carry."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "it is no picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__


def _protocol(record: RunRecord) -> str:
    """``, protocol C``: scores of single images are those of the picture, which may say white; empty without white."""
    if record.labels is None or record.labels.white is None:
        return ""
    return f", protocol {PROTOCOLS['five_class']}"


def _layer_choice(layers: Sequence[str], shown: str, group: str) -> Markup:
    choices = [
        tag("label", tag("input", type="radio", name=group, value=layer, checked=layer == shown), layer_title(layer))
        for layer in layers
    ]
    return tag("fieldset", tag("legend", "Layer over the image"), *choices)


def _slider(name: str, label: str) -> Markup:
    slider = tag("input", type="range", id=name, min=0, max=100, step=5, value=OPACITY)
    return tag("div", tag("label", label, for_=name), slider, tag("output", f"{OPACITY} %", for_=name), class_="slider")


def _order() -> Markup:
    choices = (("given", "as written"), ("worst", "worst mIoU first"), ("best", "best mIoU first"))
    options = [tag("option", words, value=value) for value, words in choices]
    return tag("div", tag("label", "Order", for_="order"), tag("select", *options, id="order"), class_="order")


def _enlarged(layers: Sequence[str], shown: str, labels: LabelSpace | None) -> Markup:
    """The dialog of one enlarged image; filled by the script."""
    steps = [
        tag("button", words, type="button", id=name)
        for name, words in (("previous", "Previous"), ("next", "Next"), ("close", "Close"))
    ]
    head = tag("div", tag("h3", id="enlarged-title"), tag("div", *steps, class_="steps"), class_="dialog-head")
    controls = tag(
        "div", _layer_choice(layers, shown, "enlarged-layer"), _slider("enlarged-opacity", "Opacity"), class_="controls"
    )
    parts = (head, controls, legend(labels), tag("div", class_="stack"))
    return tag("dialog", *parts, id="enlarged", aria_labelledby="enlarged-title")


def _white(labels: LabelSpace, name: str) -> str | None:
    is_white = labels.white is not None and labels.index(name) == labels.white
    return " (no tissue)" if is_white else None
