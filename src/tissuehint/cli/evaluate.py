"""``tissuehint evaluate``: score predicted masks, or a model on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tissuehint.cli.models import Device

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from tissuehint.data.records import Record, TissueDataset
    from tissuehint.labels import LabelSpace
    from tissuehint.metrics.protocols import Protocol
    from tissuehint.model import TissueModel


class WhiteProtocol(StrEnum):
    """What happens at white pixels."""

    IGNORE_WHITE = "ignore_white"
    FP_ON_WHITE = "fp_on_white"
    FIVE_CLASS = "five_class"


class Split(StrEnum):
    """Part of a data set."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


@dataclass(frozen=True)
class Scored:
    """Scores, and what must stand beside them."""

    labels: LabelSpace
    rows: list[dict[str, Any]]
    notes: tuple[str, ...] = ()


def evaluate(
    what: Annotated[Path, typer.Argument(metavar="PREDICTIONS|MODEL", help="Folder of predicted masks, or a model.")],
    masks: Annotated[Path | None, typer.Argument(help="Folder of true masks, named as the predictions.")] = None,
    classes: Annotated[Path | None, typer.Option(help="classes.json of the masks (with MASKS).")] = None,
    data: Annotated[str | None, typer.Option(help="Score a model on this: a catalog name or a data folder.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where the catalog data set lies (with --data).")] = None,
    scheme: Annotated[str | None, typer.Option(help="Split scheme of the data set (with --data).")] = None,
    split: Annotated[Split, typer.Option(help="Scored images (with --data).")] = Split.TEST,
    protocol: Annotated[
        list[WhiteProtocol] | None,
        typer.Option(
            help="What happens at white pixels; repeatable. A model: all three. Masks: five_class, since a mask that "
            "says white has no second choice."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time (with --data).")] = 8,
    device: Annotated[Device, typer.Option(help="Where to compute (with --data).")] = Device.AUTO,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the scores.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Score predicted masks, or a model.

    Either a folder of PREDICTIONS against MASKS with --classes, or a MODEL on --data.

    Counts run over all pixels of all images. Protocols: ignore_white (A), fp_on_white (B), five_class (C).
    """
    from tissuehint.cli.output import say
    from tissuehint.cli.scores import print_scores
    from tissuehint.errors import InputError
    from tissuehint.files import write_json

    chosen = [str(one) for one in protocol or ()]
    bar = None if quiet else "scoring"
    if (masks is None) == (data is None):
        raise InputError("evaluate", "needs true masks or a data set", "give MASKS with --classes, or --data")
    if masks is not None:
        if classes is None:
            raise InputError("evaluate", "needs the classes of the masks", "give --classes classes.json")
        scored = score_folders(what, masks, read_classes(classes), chosen, bar)
    else:
        from tissuehint.cli.data import read_source
        from tissuehint.cli.models import load_model

        assert data is not None
        model = load_model(what, device)
        scored = score_model(model, read_source(data, root, scheme), str(split), chosen, batch_size, bar, what.name)
    print_scores(scored.rows, f"Scores of {what}")
    _print_classes(scored.rows)
    for line in scored.notes:
        say(f"note  {line}")
    if json_file is not None:
        content = {"labels": scored.labels.to_dict(), "rows": scored.rows, "notes": list(scored.notes)}
        write_json(json_file, {"format": 1, **content})
        say(f"scores: {json_file}")


def read_classes(path: Path) -> LabelSpace:
    """A label space from ``classes.json``.

    Raises:
        InputError: missing, no JSON, or no label space.
    """
    import json

    from tissuehint.errors import InputError
    from tissuehint.labels import LabelSpace

    try:
        return LabelSpace.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except InputError as error:
        raise InputError(f"{path}: {error.subject}", error.rule, error.fix) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"names no classes ({type(error).__name__}: {error})"
        raise InputError(path, rule, 'write {"names": ["gland", "stroma", "white"], "white": 2}') from None


def score_folders(
    predictions: Path, masks: Path, labels: LabelSpace, protocols: Sequence[str], bar: str | None
) -> Scored:
    """Score a folder of predicted masks.

    Args:
        predictions: one mask per true mask, same name without suffix, same size; a class at every pixel.
        masks: true masks, 255 = ignore.
        labels: classes of both.
        protocols: empty takes ``five_class``.
        bar: text of the progress bar.

    Raises:
        InputError: a prediction is missing, has another size or a value that is no class; or says white, where the
            protocol lets a prediction say tissue only.
    """
    import torch

    from tissuehint.data.records import Record, list_images, read_codes
    from tissuehint.errors import InputError
    from tissuehint.pipeline.scoring import score_split

    truths = list_images(masks)
    found = {path.stem: path for path in list_images(predictions) if path.suffix.lower() not in (".jpg", ".jpeg")}
    if not truths:
        raise InputError(masks, "holds no mask", "give the folder of true masks")
    missing = [path.stem for path in truths if path.stem not in found]
    if missing:
        rule = f"has no prediction for {len(missing)} of {len(truths)} masks: {', '.join(missing[:5])}"
        raise InputError(predictions, rule, "predict them too, or remove their masks")
    extra = len(found) - len(truths)
    notes = (f"{extra} predictions have no true mask and are left out",) if extra else ()
    used: list[Any] = list(protocols) or ["five_class"]
    # a record's image gives the size that its mask must have: here that is the prediction
    records = [Record(path.stem, found[path.stem], path) for path in truths]

    def one_hot(record: Record) -> Tensor:
        codes, path = read_codes(found[record.id]), found[record.id]
        _check_prediction(codes, record, path, labels, used)
        values = torch.from_numpy(codes)
        return torch.stack([values == index for index in range(labels.num_classes)]).float()

    scores = score_split(records, labels, one_hot, protocols=used, progress=bar)
    rows = scores.rows(stage="masks", name=predictions.name, gate="none", split=masks.name)
    # a mask has no probabilities: a curve over thresholds would say nothing
    return Scored(labels, [{key: value for key, value in row.items() if key != "auc"} for row in rows], notes)


def _check_prediction(
    codes: NDArray[Any], record: Record, path: Path, labels: LabelSpace, protocols: Sequence[Protocol]
) -> None:
    from tissuehint.errors import InputError

    truth = record.read_mask(labels)
    if int(codes.max(initial=0)) >= labels.num_classes:
        value = int(codes[codes >= labels.num_classes][0])
        rule = f"predicts the value {value}, classes are 0..{labels.num_classes - 1}"
        raise InputError(path, rule, "write a class at every pixel")
    if labels.white is None:
        return
    for protocol in protocols:
        counted = truth != labels.ignore
        if protocol == "ignore_white":
            counted &= truth != labels.white
        if protocol != "five_class" and bool((counted & (codes == labels.white)).any()):
            rule = f"says white, but protocol {protocol} scores predictions of tissue only"
            raise InputError(path, rule, "use --protocol five_class, or score the model with --data")


def score_model(
    model: TissueModel,
    dataset: TissueDataset,
    split: str,
    protocols: Sequence[str],
    batch_size: int,
    bar: str | None,
    name: str,
) -> Scored:
    """Score a model on the images of a split that have masks.

    Images whose pixel size is known and is not the model's are seen at the model's.

    Args:
        model: what is scored.
        dataset: with the classes of the model, in its order.
        split: scored images.
        protocols: empty takes all.
        batch_size: windows at a time.
        bar: text of the progress bar.
        name: of the model, for the table.

    Raises:
        InputError: other classes, no image with a mask, or a broken image or mask.
    """
    from tissuehint.cli.models import map_of, zoom_to_model
    from tissuehint.errors import InputError
    from tissuehint.metrics import PROTOCOL_IDS
    from tissuehint.pipeline.scoring import score_split

    labels, known = dataset.labels, model.labels
    if (known.names, known.white) != (labels.names, labels.white):
        rule = f"has the classes {', '.join(labels.names)}, the model knows {', '.join(known.names)}"
        raise InputError(f"data set {dataset.name}", rule, "take data with the classes of the model, in its order")
    records = [record for record in dataset.splits.get(split, ()) if record.mask is not None]
    if not records:
        raise InputError(f"data set {dataset.name}", f"has no images with masks in {split}", "choose another --split")
    notes = list(dataset.notes)
    resampled = sum(zoom_to_model(model, record.um_per_px) != 1 for record in records)
    if resampled:
        notes.append(f"{resampled} images are resampled to the {model.um_per_px:g} um per pixel of the model")

    def tissue_map_of(record: Record) -> Tensor:
        return map_of(model, record.read_image(), record.um_per_px, batch_size)

    used: list[Any] = list(protocols) or list(PROTOCOL_IDS)
    scores = score_split(records, labels, tissue_map_of, protocols=used, progress=bar)
    gate = "predicted" if model.architecture["kind"] == "method" else "none"
    return Scored(labels, scores.rows(stage="model", name=name, gate=gate, split=split), tuple(notes))


def _print_classes(rows: Sequence[dict[str, Any]]) -> None:
    from tissuehint.cli.output import decimal, table
    from tissuehint.cli.scores import in_order, protocol_name

    ordered = in_order(rows)
    heads = ["class", *(f"IoU {protocol_name(row)}" for row in ordered)]
    cells = [[name, *(decimal(row["iou"][name]) for row in ordered)] for name in ordered[0]["iou"]]
    table("", heads, cells, numbers=len(ordered))
