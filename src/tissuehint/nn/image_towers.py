"""The networks behind frozen image encoders: built without a download, filled strictly from a file or the hub.

The code of the architectures is the Apache-2.0 one of transformers and timm. Files are opened as safetensors or with
``torch.load(weights_only=True)``, downloaded ones too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.config import NAMED_STATISTICS, ChannelStatistics
from tissuehint.nn.encoders import any_size
from tissuehint.nn.image_encoder_catalog import CATALOG, CatalogEncoder
from tissuehint.nn.transformers_backbones import _quiet
from tissuehint.nn.weights import DERIVED, LoadedWeights, load_backbone, read_tensors

# which version of a repository on the hub is asked for
REVISION = "main"
# in a folder of a transformers checkpoint and in a repository on the hub, the first that is there
CHECKPOINT_FILES = ("model.safetensors", "pytorch_model.bin")
# counted blocks of a transformer: more of them than the architecture has is a larger relative
BLOCK = re.compile(r"(^|\.)(layers?|blocks)\.\d+\.")
CHANGE = "give weights of the same architecture, or change the encoder's name"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN, or give the path of a weights file"


class TransformersTower(nn.Module):
    """A vision tower of transformers that gives one vector per image.

    MedCLIP: Swin's pooled last map through the trained projection. CLIP and PLIP: class token through the trained
    projection. Swin: the pooled last map. Phikon, Phikon-v2, DINOv2: class token after the last norm.

    Args:
        row: of the catalog, of any family but ``timm``.
    """

    def __init__(self, row: CatalogEncoder) -> None:
        super().__init__()
        self.row = row
        # the attributes have the names of MedCLIP's published tower
        self.model: Any = _transformers_model(row)
        self.projection_head = nn.Linear(768, row.dim, bias=False) if row.family == "medclip" else None

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (B,3,s,s) to (B,D)."""
        words = {}
        if self.row.family in ("clip", "vit") and images.shape[-1] != self.model.config.image_size:
            words["interpolate_pos_encoding"] = True
        output = self.model(images, **words)
        if self.row.family == "clip":
            features = output.image_embeds
        elif self.row.family in ("swin", "medclip"):
            features = output.pooler_output
        else:
            features = output.last_hidden_state[:, 0]
        if self.projection_head is not None:
            features = self.projection_head(features)
        return cast(Tensor, features)

    def load(self, path: Path) -> LoadedWeights:
        """Read the tower from a file of the publisher's layout, of old or new transformers; text names are ignored.

        Raises:
            InputError: unreadable file, missing tensors, or another architecture; the tower is then as it was.
        """
        tensors = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path).items()}
        names, head = self._names(tensors)
        if self.projection_head is not None:
            _check_head(path, tensors.get(head), self.projection_head.weight)
        loaded = _translate(self.model, {own: tensors[name] for own, name in names.items()}, path, self.row.name)
        if self.projection_head is not None:
            self.projection_head.load_state_dict({"weight": tensors[head]})
        unused = tensors.keys() - set(names.values()) - ({head} if self.projection_head is not None else set())
        ignored = sorted(unused | {names[own] for own in loaded.ignored})
        return LoadedWeights(str(path), len(self.state_dict()), tuple(ignored))

    def _names(self, tensors: Iterable[str]) -> tuple[dict[str, str], str]:
        """Names in the model with names in the file, and the name of MedCLIP's projection in the file."""
        names = list(tensors)
        if self.row.family == "clip":
            return {name: name for name in names if name.startswith(("vision_model.", "visual_projection."))}, ""
        if self.row.family != "medclip":
            return {name: name for name in names}, ""
        # the published file is of image and text model; a saved vision tower alone has no prefix
        tower = "vision_model." if any(name.startswith("vision_model.") for name in names) else ""
        model = f"{tower}model."
        inside = {name.removeprefix(model): name for name in names if name.startswith(model)}
        return inside, f"{tower}projection_head.weight"


class TimmTower(nn.Module):
    """A timm network without its classifier that gives one vector per image.

    Convolutional networks: pooled features before the classifier, head convolutions included. Transformers: as timm
    pools them, the class token mostly. Virchow and Virchow2: the class token and the mean of the patch tokens
    (registers left out) one behind the other, as their model cards recommend.

    Args:
        name: in the catalog, or in timm.
        pretrained: download timm's weights (names of timm only).
    """

    def __init__(self, name: str, pretrained: bool = False) -> None:
        super().__init__()
        self.row = CATALOG.get(name)
        self.name = name
        self.network: Any = _timm_network(name, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised (B,3,s,s) to (B,D)."""
        output: Tensor = self.network(images)
        if self.row is not None and self.row.pooling == "class+patches":
            return torch.cat([output[:, 0], output[:, self.network.num_prefix_tokens :].mean(1)], 1)
        return output

    def load(self, path: Path) -> LoadedWeights:
        """Read a file with timm's names; a classifier in it is ignored, whatever its number of classes.

        Raises:
            InputError: unreadable file, missing tensors, or another architecture.
        """
        import timm

        if self.row is not None:
            return load_backbone(self.network, path)
        with torch.device("meta"):
            whole = timm.create_model(self.name).state_dict()
        return load_backbone(self.network, path, whole)


def build_tower(name: str, weights: str) -> tuple[TransformersTower | TimmTower, LoadedWeights | None]:
    """Build a tower and fill it.

    Args:
        name: in the catalog, or in timm.
        weights: ``none``, ``hub``, or the path of a file or of a folder of a transformers checkpoint.

    Raises:
        InputError: unknown name, missing or wrong weights, a hub that cannot be reached or wants a login.
    """
    row = CATALOG.get(name)
    if row is None:
        tower = TimmTower(name, pretrained=weights == "hub")
        if weights == "hub":
            return tower, LoadedWeights("hub", len(tower.state_dict()))
        return tower, None if weights == "none" else tower.load(weights_file(weights))
    # the file first: nothing is built where there is nothing to read
    file = None if weights == "none" else fetch(row) if weights == "hub" else weights_file(weights)
    known = TimmTower(name) if row.family == "timm" else TransformersTower(row)
    if file is None:
        return known, None
    loaded = known.load(file)
    return known, replace(loaded, source="hub") if weights == "hub" else loaded


def weights_file(path: str) -> Path:
    """The file itself, or the weights in a folder of a transformers checkpoint.

    Raises:
        InputError: nothing there, or a folder without weights in one file.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise InputError(place, "weights file does not exist", "give an existing file, or weights: none")
    if not place.is_dir():
        return place
    for name in CHECKPOINT_FILES:
        if (place / name).is_file():
            return place / name
    rule = f"holds neither {' nor '.join(CHECKPOINT_FILES)}"
    raise InputError(place, rule, "give the folder of a whole checkpoint, or a weights file")


def fetch(row: CatalogEncoder) -> Path:
    """Download the weights of a publisher, or find them in the hub's cache.

    Raises:
        InputError: nothing on the hub, no connection, no access.
    """
    if row.hub is None:
        fix = f"get {row.page}, unpack it and give the path of its {CHECKPOINT_FILES[-1]}"
        raise InputError(f"image encoder '{row.name}'", "has no weights on the hub", fix)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    problem: Exception | None = None
    for name in CHECKPOINT_FILES:
        try:
            return Path(hf_hub_download(row.hub, name, revision=REVISION))
        except EntryNotFoundError as error:  # offline also says this: the other file may be in the cache
            problem = problem or error
        except Exception as error:  # whatever the hub's client and the network below it raise
            problem = error
            break
    raise hub_error(row.name, problem, row) from problem


def hub_error(name: str, error: Exception | None, row: CatalogEncoder | None = None) -> InputError:
    """The one line for a download that failed; for a repository with conditions it says where to accept them."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    rule = f"weights cannot be fetched from the hub ({lines[0][:160]})"
    fix = "give the path of a weights file, or weights: none"
    if row is not None and row.gated is not False:
        fix = f"ask for access at {row.page}, {LOG_IN}"
    return InputError(f"image encoder '{name}'", rule, fix)


def check_name(name: str) -> None:
    """Raise ``InputError`` for a name that neither the catalog nor timm knows."""
    import timm

    if name in CATALOG:
        return
    if timm.is_model(name):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:  # the part of the name behind a dot
            fix = f"use {name.split('.')[0]}, or a tag of timm.list_pretrained()"
            raise InputError(
                f"image encoder '{name}'", f"has weights that timm does not know ({error})", fix
            ) from error
        return
    import difflib

    near = difflib.get_close_matches(name.split(".")[0], [*CATALOG, *timm.list_models()], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else "tissuehint methods --encoders lists them"
    raise InputError(f"image encoder '{name}'", "is neither in the catalog nor a network of timm", hint)


def timm_defaults(name: str) -> tuple[int, ChannelStatistics]:
    """Side and normalisation of the default weights of a timm network; 224 and ImageNet's where timm names none."""
    import timm

    defaults: Any = timm.get_pretrained_cfg(name)
    if defaults is None:
        return 224, NAMED_STATISTICS["imagenet"]
    return int(defaults.input_size[-1]), ChannelStatistics(mean=defaults.mean, std=defaults.std)


def timm_dim(name: str, side: int) -> int:
    """D of a timm network at a side, from a pass without numbers.

    Raises:
        InputError: a side that the network does not take, or a network that gives no one vector per image.
    """
    subject = f"image encoder '{name}'"
    try:
        with torch.device("meta"), torch.no_grad():
            shape = tuple(TimmTower(name).eval()(torch.empty(1, 3, side, side)).shape)
    except InputError:
        raise
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        rule = f"does not take images of {side} x {side} pixels ({lines[0][:160]})"
        raise InputError(subject, rule, "leave side out, or use a multiple of the patch size") from error
    if len(shape) != 2:
        raise InputError(subject, f"gives {list(shape)}, no vector per image", "use another encoder")
    return int(shape[1])


def _transformers_model(row: CatalogEncoder) -> nn.Module:
    import transformers as library

    transformers: Any = library  # its configurations take more arguments than they declare
    model: nn.Module
    if row.family in ("swin", "medclip"):
        model = transformers.SwinModel(transformers.SwinConfig(**row.options))
    elif row.family == "clip":
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**row.options))
    elif row.family == "vit":
        model = transformers.ViTModel(transformers.ViTConfig(**row.options), add_pooling_layer=False)
    else:  # the mask token is for pretraining only
        model = transformers.Dinov2Model(transformers.Dinov2Config(use_mask_token=False, **row.options))
    return model


def _timm_network(name: str, pretrained: bool) -> nn.Module:
    import timm
    from timm.layers.mlp import SwiGLUPacked

    row = CATALOG.get(name)
    options: dict[str, Any] = dict(row.options) if row else {}
    if row is not None and row.swiglu:
        options.update(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)
    architecture = row.architecture if row else name
    try:
        return any_size(
            lambda words: timm.create_model(architecture, pretrained=pretrained, num_classes=0, **words, **options)
        )
    except TypeError as error:
        raise InputError(f"image encoder '{name}'", f"cannot be built ({error})", "use another encoder") from error
    except (OSError, RuntimeError) as error:
        if pretrained:
            raise hub_error(name, error) from error
        raise


def _check_head(path: Path, head: Tensor | None, own: Tensor) -> None:
    if head is None:
        raise InputError(path, "has no projection_head.weight of the vision tower", CHANGE)
    if head.shape != own.shape:
        rule = f"'projection_head.weight' is {list(head.shape)}, the encoder needs {list(own.shape)}"
        raise InputError(path, rule, CHANGE)


def _translate(model: Any, tensors: Mapping[str, Tensor], path: Path, name: str) -> LoadedWeights:
    """Fill a model of transformers, which translates the names of its earlier versions; untouched if refused."""
    total = len(model.state_dict())
    needed = {key: each for key, each in tensors.items() if not key.endswith((*DERIVED, "position_ids"))}
    if not needed:
        raise InputError(path, f"has none of the {total} tensors of image encoder '{name}'", CHANGE)
    words = {"add_pooling_layer": False} if model.base_model_prefix == "vit" else {}
    try:
        with _quiet():
            filled, report = type(model).from_pretrained(
                None, config=model.config, state_dict=needed, output_loading_info=True, dtype=torch.float32, **words
            )
    except RuntimeError as error:  # the one that transformers raises for shapes
        raise InputError(path, f"has tensors of other shapes than image encoder '{name}'", CHANGE) from error
    missing = sorted(report["missing_keys"])
    if missing:
        rule = f"has {total - len(missing)} of the {total} tensors of image encoder '{name}'; missing: {missing[0]}"
        raise InputError(path, rule + (", ..." if len(missing) > 1 else ""), CHANGE)
    extra = sorted(report["unexpected_keys"])
    foreign = [key for key in extra if BLOCK.search(key)]
    if foreign:
        rule = f"has {len(foreign)} tensors more than image encoder '{name}': {foreign[0]}, ..."
        raise InputError(path, rule, CHANGE)
    model.load_state_dict(filled.state_dict())
    return LoadedWeights(str(path), total, tuple(key for key in extra if key in needed))
