"""Segmentation networks: any of segmentation_models_pytorch, or DeepLab-v2, on images of any size."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig, NetworkConfig
from tissuehint.nn.deeplab_v2 import DeepLabV2
from tissuehint.nn.encoders import (
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
from tissuehint.nn.weights import LoadedWeights, load_backbone

__all__ = ["NetworkConfig", "SegmentationNetwork", "build_network"]

NATIVE_PREFIX = "smp:"
DEEPLAB_V2 = "deeplab_v2"
# DPT halves the map of its vision transformer once more; PAN halves that of its encoder three times
MULTIPLES = {"dpt": 32, "pan": 128}
# what NetworkConfig and the number of classes say already
TAKEN = {"self", "encoder", "num_classes", "encoder_name", "encoder_weights", "in_channels", "classes"}
# they would change what the network returns
TAKEN |= {"activation", "aux_params", "kwargs"}


class SegmentationNetwork(nn.Module):
    """A network with its normalisation, from images of any size (32 px and more) to logits of that size.

    Images are padded below and at the right by repeating the last row and column up to the multiple that the network
    needs, and the logits are cropped.

    Attributes:
        config: as built.
        num_classes: K.
        multiple: of the sides that the inner network sees.
        weights: what was read into the encoder, or None for random weights.
    """

    def __init__(self, config: NetworkConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise InputError(f"num_classes {num_classes}", "is not at least 1", "give the data set's number of classes")
        self.config = config
        self.num_classes = num_classes
        self.normalization = Normalization(config.encoder.statistics)
        self.weights: LoadedWeights | None
        self.network: Any
        if config.architecture == DEEPLAB_V2:
            _check_options(config, DeepLabV2)
            self.network = DeepLabV2(config.encoder, num_classes, **config.decoder)
            self.weights, self.multiple = self.network.weights, self.network.multiple
        else:
            self.network = _smp_network(config, num_classes)
            self.weights = _load(self.network.encoder, config)
            self.multiple = MULTIPLES.get(config.architecture, int(self.network.encoder.output_stride))

    @property
    def encoder(self) -> nn.Module:
        """The part that pretrained weights are for."""
        encoder: nn.Module = self.network.encoder
        return encoder

    def forward(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to logits (B,K,H,W).

        Raises:
            InputError: a side under 32 px.
        """
        height, width = images.shape[-2:]
        check_side(height, width)
        padded = pad_to_multiple(images, self.multiple)
        logits: Tensor = self.network(self.normalization(padded))
        if logits.shape[-2:] != padded.shape[-2:]:  # architectures whose upsampling is set for another encoder depth
            logits = nn.functional.interpolate(logits, padded.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


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
        """Part of the interface; images have three channels here."""

    def make_dilated(self, output_stride: int) -> None:
        """Part of the interface; the constructor has done it."""


def _smp_network(config: NetworkConfig, num_classes: int) -> nn.Module:
    import segmentation_models_pytorch as smp

    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    if config.architecture not in architectures:
        names = ", ".join([*sorted(architectures), DEEPLAB_V2])
        raise InputError(f"architecture '{config.architecture}'", f"is not one of {names}", "use one of these names")
    architecture = architectures[config.architecture]
    _check_options(config, architecture)
    name, pretrained = _smp_encoder(config.encoder)
    options: dict[str, Any] = {"in_channels": 3, "classes": num_classes, **config.decoder}
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
