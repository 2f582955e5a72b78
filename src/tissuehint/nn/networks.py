"""Segmentation networks: any of segmentation_models_pytorch, or DeepLab-v2, on images of any size."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig, NetworkConfig
from tissuehint.nn.deeplab_v2 import DeepLabV2
from tissuehint.nn.encoders import (
    MINIMUM_SIDE,
    TRANSFORMERS_PREFIX,
    Normalization,
    any_size,
    check_side,
    check_timm_name,
    hub_error,
    load_timm_weights,
    pad_to_multiple,
)
from tissuehint.nn.transformers_backbones import TransformersPyramid
from tissuehint.nn.trunk import Trunk
from tissuehint.nn.weights import LoadedWeights, load_backbone

__all__ = ["Dense", "NetworkConfig", "SegmentationNetwork", "build_network"]

NATIVE_PREFIX = "smp:"
DEEPLAB_V2 = "deeplab_v2"
# DPT halves the map of its vision transformer once more; PAN halves that of its encoder three times
MULTIPLES = {"dpt": 32, "pan": 128}
# what NetworkConfig and the number of classes say already
TAKEN = {"self", "encoder", "num_classes", "encoder_name", "encoder_weights", "in_channels", "classes"}
# they would change what the network returns
TAKEN |= {"activation", "aux_params", "kwargs"}


class Dense(NamedTuple):
    """What a network says of each cell of its working grid.

    The grid has h x w cells: the image itself, shrunk by ``scale``, and the cells of a trunk of stride t at
    ceil(H scale / t) x ceil(W scale / t). Cell (r, c) covers the image from row r s to (r + 1) s with s = t H / h' and
    h' = round(H scale), columns likewise; cells at the lower and right border may reach beyond the image.

    Args:
        features: (B,D,h,w), the input of the segmentation head: the last decoder feature. Where the head upsamples,
            enlarged bilinearly in the way of the head.
        logits: (B,K,h,w).
    """

    features: Tensor
    logits: Tensor


class SegmentationNetwork(nn.Module):
    """A network with its normalisation, from images of any size (32 px and more) to logits of that size.

    Images are shrunk by ``config.scale``, padded below and at the right by repeating the last row and column up to
    the multiple that the network needs, and go through the trunk, if there is one; the logits are cropped and enlarged
    bilinearly to the image.

    Attributes:
        config: as built.
        num_classes: K.
        stride: pixels of the shrunk image per cell of the logits: that of the trunk, or 1.
        multiple: of the sides of the padded image.
        weights: what was read into ``encoder``, or None for random weights.
    """

    def __init__(self, config: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(f"num_classes {num_classes}", "is not at least 1", "give the data set's number of classes")
        self.config = config
        self.num_classes = num_classes
        self.trunk = None if config.trunk is None else Trunk(config.trunk)
        self.stride = 1 if self.trunk is None else self.trunk.stride
        self.normalization = Normalization((config.trunk or config).encoder.statistics)
        self.weights: LoadedWeights | None
        self.network: Any
        if config.architecture == DEEPLAB_V2:
            _check_options(config, DeepLabV2)
            self.network = DeepLabV2(config.encoder, num_classes, **config.decoder)
            self.weights, multiple = self.network.weights, self.network.multiple
        else:
            self.network = _smp_network(config, num_classes, 3 if self.trunk is None else self.trunk.channels)
            self.weights = _load(self.network.encoder, config) if self.trunk is None else self.trunk.weights
            multiple = MULTIPLES.get(config.architecture, int(self.network.encoder.output_stride))
        self.multiple = self.stride * multiple

    @property
    def encoder(self) -> nn.Module:
        """The part that pretrained weights are for: the trunk, or the encoder of a network without one."""
        encoder: nn.Module = self.network.encoder if self.trunk is None else self.trunk
        return encoder

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Size (h,w) of the working grid of an image of H x W pixels, see ``Dense``."""
        height, width = self._scaled(height, width)
        return -(-height // self.stride), -(-width // self.stride)

    def covered(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (height, width) of an image of H x W that its working grid covers.

        The cells at the lower and right border may reach beyond the image: they keep their size.
        """
        sides = zip(self.grid(height, width), (height, width), self._scaled(height, width), strict=True)
        tall, wide = (round(cells * self.stride * side / scaled) for cells, side, scaled in sides)
        return tall, wide

    def dense(self, images: Tensor) -> Dense:
        """Images (B,3,H,W) in [0,1] to features (B,D,h,w) and logits (B,K,h,w) on the working grid.

        Raises:
            InputError: a side under 32 px, after ``scale``.
        """
        height, width = self.grid(*images.shape[-2:])
        head: nn.Module = self.network.segmentation_head
        with _inputs(head) as seen:
            logits = self._padded_logits(images)
        # DeepLab-v2 on several scales asks its head once per scale; the finest features are those of the image
        features = max(seen, key=lambda each: each.shape[-1])
        if features.shape[-2:] != logits.shape[-2:]:
            corners = not isinstance(self.network, DeepLabV2)  # heads of segmentation_models_pytorch align them
            features = F.interpolate(features, logits.shape[-2:], mode="bilinear", align_corners=corners)
        return Dense(features[..., :height, :width], logits[..., :height, :width])

    def forward(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to logits (B,K,H,W).

        Raises:
            InputError: a side under 32 px, after ``scale``.
        """
        size = images.shape[-2:]
        height, width = self.grid(*size)
        logits = self._padded_logits(images)[..., :height, :width]
        if logits.shape[-2:] == size:
            return logits
        logits = F.interpolate(logits, self.covered(*size), mode="bilinear", align_corners=False)
        return logits[..., : size[0], : size[1]]

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        return max(1, round(height * self.config.scale)), max(1, round(width * self.config.scale))

    def _padded_logits(self, images: Tensor) -> Tensor:
        """Logits on the grid of the padded image."""
        height, width = images.shape[-2:]
        scaled = self._scaled(height, width)
        if self.config.scale == 1:
            check_side(height, width)
        elif min(scaled) < MINIMUM_SIDE:
            subject = f"image of {height} x {width} pixels at scale {self.config.scale:g} ({scaled[0]} x {scaled[1]})"
            rule = f"networks take sides of at least {MINIMUM_SIDE} pixels"
            raise InputError(subject, rule, "use larger patches or a larger scale")
        if scaled != (height, width):
            images = F.interpolate(images, scaled, mode="bilinear", align_corners=False, antialias=True)
        padded = self.normalization(pad_to_multiple(images, self.multiple))
        maps = padded if self.trunk is None else self.trunk(padded)
        logits: Tensor = self.network(maps)
        if logits.shape[-2:] != maps.shape[-2:]:  # architectures whose upsampling is set for another encoder depth
            logits = F.interpolate(logits, maps.shape[-2:], mode="bilinear", align_corners=False)
        return logits


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """The first argument of every call of ``module`` inside."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        handle.remove()


def build_network(config: NetworkConfig, num_classes: int) -> SegmentationNetwork:
    """Build a segmentation network; decoders (and encoders with ``weights: none``) draw from torch's generator.

    Args:
        config: architecture, encoder, options.
        num_classes: K, the channels of the logits.

    Raises:
        InputError: unknown architecture, option or encoder, a pair that does not fit, missing or wrong weights.

    Example:
        >>> import torch
        >>> network = build_network(NetworkConfig(encoder=EncoderConfig(name="mobilenetv2_100")), num_classes=4)
        >>> network(torch.rand(2, 3, 50, 70)).shape
        torch.Size([2, 4, 50, 70])
    """
    return SegmentationNetwork(config, num_classes)


class TransformersEncoder(nn.Module):
    """A transformers backbone behind the interface that segmentation_models_pytorch expects of an encoder.

    Args:
        name: of ``TransformersPyramid``; of strides 4, 8, 16, 32.
        depth: number of halvings, 2 to 5.
        output_stride: 32, or 8 or 16 where the backbone has it.
    """

    def __init__(self, name: str, depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        self.model = TransformersPyramid(name, None if output_stride == 32 else output_stride)
        if self.model.strides[0] != 4:
            rule = "has one stride, these networks need a pyramid"
            raise InputError(
                f"encoder '{TRANSFORMERS_PREFIX}{name}'", rule, "use hf:mit_*, hf:swin_*, or dpt with a timm name"
            )
        self.levels = depth - 1
        # the image itself, and nothing at stride 2
        self.out_channels = [3, 0, *self.model.channels[: self.levels]]
        self.output_stride = min(output_stride, 2**depth)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised (B,3,H,W) to the image, an empty map of stride 2, and maps of stride 4 and more."""
        batch, _, height, width = images.shape
        empty = images.new_empty((batch, 0, height // 2, width // 2))
        return [images, empty, *self.model(images)[: self.levels]]

    def set_in_channels(self, in_channels: int, pretrained: bool = False) -> None:
        """Part of the interface; there are three channels here."""
        if in_channels != 3:
            raise InputError(
                f"encoder '{TRANSFORMERS_PREFIX}{self.model.name}'",
                f"takes the 3 channels of an image, not the {in_channels} of a trunk",
                "use a timm encoder behind a trunk, or leave the trunk out",
            )

    def make_dilated(self, output_stride: int) -> None:
        """Part of the interface; the constructor has done it."""


def _smp_network(config: NetworkConfig, num_classes: int, in_channels: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    if config.architecture not in architectures:
        names = ", ".join([*sorted(architectures), DEEPLAB_V2])
        raise InputError(f"architecture '{config.architecture}'", f"is not one of {names}", "use one of these names")
    architecture = architectures[config.architecture]
    _check_options(config, architecture)
    name, pretrained = _smp_encoder(config.encoder)
    options: dict[str, Any] = {"in_channels": in_channels, "classes": num_classes, **config.decoder}
    if config.architecture == "dpt":
        options["num_classes"] = 0  # of the vision transformer, whose classifier is not used

    def create(words: dict[str, Any]) -> nn.Module:
        network: nn.Module = architecture(encoder_name=name, encoder_weights=pretrained, **options, **words)
        return network

    try:
        return any_size(create) if name.startswith("tu-") else create({})
    except InputError:
        raise
    except (OSError, RuntimeError) as error:
        if pretrained is not None:
            raise hub_error(config.encoder, error) from error
        raise _misfit(config, error) from error
    except (TypeError, ValueError, KeyError, AssertionError, IndexError, NotImplementedError) as error:
        raise _misfit(config, error) from error


def _smp_encoder(encoder: EncoderConfig) -> tuple[str, bool | str | None]:
    """Name and pretrained argument for segmentation_models_pytorch; transformers' backbones become known to it."""
    from segmentation_models_pytorch import encoders as smp_encoders

    name, hub = encoder.name, encoder.weights == "hub"
    if name.startswith(TRANSFORMERS_PREFIX):
        parameters = {"name": name.removeprefix(TRANSFORMERS_PREFIX)}
        entry = {"encoder": TransformersEncoder, "params": parameters, "pretrained_settings": {}}
        smp_encoders.encoders.setdefault(name, entry)
        return name, None
    if not name.startswith(NATIVE_PREFIX) or name.startswith(f"{NATIVE_PREFIX}mit_"):
        check_timm_name(name)
        return f"tu-{name}", True if hub else None
    native = name.removeprefix(NATIVE_PREFIX)
    known = [each for each in smp_encoders.encoders if not each.startswith(("mit_", TRANSFORMERS_PREFIX))]
    if native not in known:
        near = ", ".join(difflib.get_close_matches(native, known)) or "resnet34"
        raise InputError(f"encoder '{name}'", "is not an encoder of segmentation_models_pytorch", f"try smp: {near}")
    return native, "imagenet" if hub else None


def _load(encoder: nn.Module, config: NetworkConfig) -> LoadedWeights | None:
    """Weights of a path into the encoder; those of the hub are in already, but for transformers."""
    weights = config.encoder.weights
    if isinstance(encoder, TransformersEncoder) and weights != "none":
        if weights != "hub":
            return encoder.model.load(Path(weights).expanduser())
        try:
            return encoder.model.load_hub()
        except (OSError, RuntimeError) as error:
            raise hub_error(config.encoder, error) from error
    if config.encoder.name.startswith(NATIVE_PREFIX) and weights not in ("none", "hub"):
        return load_backbone(encoder, weights)
    inner = getattr(encoder, "model", encoder)
    assert isinstance(inner, nn.Module)
    return load_timm_weights(inner, config.encoder)


def _check_options(config: NetworkConfig, architecture: type[nn.Module]) -> None:
    known = [name for name in inspect.signature(architecture.__init__).parameters if name not in TAKEN]
    for option in config.decoder:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            fix = f"did you mean '{near[0]}'?" if near else "use one of these options"
            raise InputError(f"option '{option}' of {config.architecture}", f"is not one of {', '.join(known)}", fix)


def _misfit(config: NetworkConfig, error: Exception) -> InputError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    rule = f"cannot be built with encoder '{config.encoder.name}' and options {config.decoder} ({lines[0][:200]})"
    return InputError(f"network '{config.architecture}'", rule, "use another encoder, architecture or option")
