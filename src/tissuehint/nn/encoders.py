"""Any timm or transformers backbone, or ResNet38d, as a feature pyramid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tissuehint.errors import InputError
from tissuehint.nn.config import ChannelStatistics, EncoderConfig
from tissuehint.nn.resnet38d import ResNet38d
from tissuehint.nn.transformers_backbones import TransformersPyramid
from tissuehint.nn.weights import LoadedWeights, load_backbone

__all__ = ["Encoder", "EncoderConfig", "Normalization", "build_encoder", "pad_to_multiple"]

MINIMUM_SIDE = 32
TRANSFORMERS_PREFIX = "hf:"
RESNET38D = "resnet38d"
# side of the image that finds out what belongs to the first levels of a pyramid
PROBE_SIDE = 64


class Normalization(nn.Module):
    """``(image - mean) / std`` per channel, for images (B,3,H,W) in [0,1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: ChannelStatistics) -> None:
        super().__init__()
        # not in the state dict: the configuration is the one place that says them
        self.register_buffer("mean", torch.tensor(statistics.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] to normalised (B,3,H,W)."""
        return (images - self.mean) / self.std


class Encoder(nn.Module):
    """A backbone with its normalisation, for images of any size from 32 px.

    Images whose sides are no multiple of the largest stride are padded below and at the right by repeating the last
    row and column; the maps are cropped to ceil(H/stride) x ceil(W/stride). timm networks of one fixed size (MaxViT,
    CoAtNet and others with fixed windows) take only the sizes that they were made for.

    Attributes:
        config: as built.
        channels: per map, fine to coarse.
        strides: per map, pixels of the image per cell.
        weights: what was read, or None for random weights.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    weights: LoadedWeights | None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.normalization = Normalization(config.statistics)
        self.backbone: nn.Module
        self._channels_last = False
        self.multiple = 1
        self._frozen_norms: tuple[str, ...] = ()
        if config.name.startswith(TRANSFORMERS_PREFIX):
            self._build_transformers()
        elif config.name == RESNET38D:
            self._build_resnet38d()
        else:
            self._build_timm()
        self._keep_depth()
        # every cell of the coarsest map sees whole pixels
        self.multiple = max(self.multiple, *self.strides)
        self._freeze()

    def train(self, mode: bool = True) -> Encoder:
        """As ``nn.Module.train``, but frozen batch norms stay in evaluation mode."""
        super().train(mode)
        for name in self._frozen_norms:
            self.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B,3,H,W) in [0,1] to maps (B,C,ceil(H/stride),ceil(W/stride)), fine to coarse.

        Raises:
            InputError: a side under 32 px, or a size that a fixed-size network refuses.
        """
        height, width = images.shape[-2:]
        check_side(height, width)
        padded = pad_to_multiple(images, self.multiple)
        try:
            maps = self.backbone(self.normalization(padded))
        except AssertionError as error:
            rule = f"does not take images of {height} x {width} pixels ({error})"
            raise InputError(
                f"encoder '{self.config.name}'", rule, "use the size in its name, or another encoder"
            ) from error
        if self._channels_last:
            maps = [each.permute(0, 3, 1, 2).contiguous() for each in maps]
        return [
            each[..., : -(-height // stride), : -(-width // stride)]
            for each, stride in zip(maps, self.strides, strict=False)  # the maps behind ``depth`` are left out
        ]

    def _build_transformers(self) -> None:
        config = self.config
        pyramid = TransformersPyramid(config.name.removeprefix(TRANSFORMERS_PREFIX), config.output_stride)
        self.backbone, self.channels, self.strides = pyramid, pyramid.channels, pyramid.strides
        if config.weights == "none":
            self.weights = None
        elif config.weights == "hub":
            try:
                self.weights = pyramid.load_hub()
            except (OSError, RuntimeError) as error:
                raise hub_error(config, error) from error
        else:
            self.weights = pyramid.load(Path(config.weights).expanduser())

    def _build_resnet38d(self) -> None:
        config = self.config
        if config.output_stride not in (None, ResNet38d.strides[-1]):
            rule = f"has output stride {ResNet38d.strides[-1]}, not {config.output_stride}"
            raise InputError(f"encoder '{config.name}'", rule, "leave output_stride out")
        if config.weights == "hub":
            fix = "give the path of the original .params file or of a converted .pth, or weights: none"
            raise InputError(f"encoder '{config.name}'", "has no weights on a publisher's hub", fix)
        backbone = ResNet38d()
        self.backbone, self.channels, self.strides = backbone, backbone.channels, backbone.strides
        self.weights = None if config.weights == "none" else backbone.load(Path(config.weights).expanduser())

    def _keep_depth(self) -> None:
        """Forget the maps behind ``depth``, and train nothing that they alone depend on."""
        depth = self.config.depth
        if depth is None:
            return
        if depth > len(self.channels):
            rule = f"is more than the {len(self.channels)} maps of '{self.config.name}'"
            raise InputError(f"depth {depth}", rule, f"use at most {len(self.channels)}")
        # the backbone still makes the others where it cannot be cut, and its images must suit these
        self.multiple = max(self.strides)
        self.channels, self.strides = self.channels[:depth], self.strides[:depth]
        used = {id(parameter) for parameter in parameters_of_levels(self, depth)}
        for parameter in self.parameters():
            if id(parameter) not in used:
                parameter.requires_grad_(False)

    def _freeze(self) -> None:
        """Take what ``frozen_norm`` and ``frozen_levels`` name out of the training."""
        frozen = parameters_of_levels(self, self.config.frozen_levels)
        for parameter in frozen:
            parameter.requires_grad_(False)
        inside = {id(parameter) for parameter in frozen}
        norms = [(name, each) for name, each in self.backbone.named_modules() if isinstance(each, _BatchNorm)]
        names = []
        for name, norm in norms:
            # a level with moving statistics would not be a frozen one
            if self.config.frozen_norm or inside.intersection(map(id, norm.parameters(recurse=False))):
                norm.requires_grad_(False)
                names.append(f"backbone.{name}" if name else "backbone")
        self._frozen_norms = tuple(names)
        if names:
            self.train(self.training)

    def _build_timm(self) -> None:
        config = self.config
        self.backbone = timm_pyramid(config, features_only=True)
        if config.depth is not None and config.depth < len(strides_of(self.backbone)):
            self.backbone = timm_pyramid(config, features_only=True, out_indices=tuple(range(config.depth)))
            cut(self.backbone)
        information: Any = self.backbone.feature_info
        self.channels = tuple(int(each) for each in information.channels())
        self.strides = tuple(int(each) for each in information.reduction())
        self._channels_last = getattr(self.backbone, "output_fmt", None) == "NHWC"
        self.weights = load_timm_weights(self.backbone, config)


def strides_of(backbone: Any) -> tuple[int, ...]:
    """Strides of the maps of a timm pyramid, fine to coarse."""
    return tuple(int(each) for each in backbone.feature_info.reduction())


def is_efficient(backbone: nn.Module) -> bool:
    """EfficientNet, MobileNet and relatives, which timm does not cut itself."""
    return [name for name, _ in backbone.named_children() if name != "act1"] == ["conv_stem", "bn1", "blocks"]


def cut(backbone: Any) -> None:
    """Drop what comes after the last map of a timm pyramid, where timm has not done it and it can be done."""
    if is_efficient(backbone):
        backbone.blocks = backbone.blocks[: backbone.feature_info.get_dicts()[-1]["stage"]]


def build_encoder(config: EncoderConfig) -> Encoder:
    """Build a backbone with the weights of its configuration; ``weights: none`` draws from torch's global generator.

    Raises:
        InputError: unknown name, refused licence, missing or wrong weights, a hub that cannot be reached.

    Example:
        >>> import torch
        >>> encoder = build_encoder(EncoderConfig(name="mobilenetv2_100"))
        >>> encoder.channels, encoder.strides
        ((16, 24, 32, 96, 320), (2, 4, 8, 16, 32))
        >>> [tuple(each.shape) for each in encoder(torch.rand(2, 3, 50, 64))][-1]
        (2, 320, 2, 2)
    """
    return Encoder(config)


def parameters_of_levels(encoder: Encoder, levels: int) -> list[nn.Parameter]:
    """The trained parameters that the first maps of an encoder depend on: those of the stem and of these levels.

    They are the ones with a gradient from one small image; torch's generators stay where they are.

    Args:
        encoder: any.
        levels: number of maps, from the finest.

    Raises:
        InputError: more levels than the encoder has, or a network that does not take this image.
    """
    if levels > len(encoder.channels):
        rule = f"is more than the {len(encoder.channels)} levels of '{encoder.config.name}'"
        raise InputError(f"frozen_levels {levels}", rule, f"use at most {len(encoder.channels)}")
    if levels == 0:
        return []
    parameters = [each for each in encoder.parameters() if each.requires_grad]
    training = encoder.training
    encoder.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            maps = encoder(probe_image(encoder).to(parameters[0].device))
            total = torch.stack([each.sum() for each in maps[:levels]]).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    except InputError as error:
        rule = f"cannot be found in an encoder that {error.rule}"
        raise InputError(f"frozen_levels {levels}", rule, "leave frozen_levels out, or use another encoder") from error
    finally:
        encoder.train(training)
    return [each for each, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def probe_image(encoder: Encoder) -> Tensor:
    """A small image (1,3,s,s) that the encoder takes, for looking at what is inside; torch's generators are left alone.

    Of 64 x 64 pixels, or of the one size of a fixed-size network.
    """
    import timm

    side = PROBE_SIDE
    name = encoder.config.name
    made_for = None if name.startswith(TRANSFORMERS_PREFIX) or name == RESNET38D else timm.get_pretrained_cfg(name)
    if made_for is not None and made_for.fixed_input_size:
        side = made_for.input_size[-1]
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (B,C,H,W) until H and W are multiples of ``multiple``."""
    below, right = -images.shape[-2] % multiple, -images.shape[-1] % multiple
    return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images


def check_side(height: int, width: int) -> None:
    """Raise ``InputError`` for an image side under 32 px."""
    if min(height, width) < MINIMUM_SIDE:
        rule = f"networks take sides of at least {MINIMUM_SIDE} pixels"
        raise InputError(f"image of {height} x {width} pixels", rule, "use larger patches")


def check_timm_name(name: str) -> None:
    """Raise ``InputError`` for a name that timm does not know or whose code may not be used."""
    import timm

    if name.removeprefix("smp:").startswith("mit_"):
        rule = "has code under a non-commercial licence in segmentation_models_pytorch"
        raise InputError(f"encoder '{name}'", rule, f"use hf:{name.removeprefix('smp:')}, which is Apache-2.0")
    if name == RESNET38D:
        rule = "is an encoder for class maps only, not for segmentation networks"
        raise InputError(f"encoder '{name}'", rule, "use resnet50 or another name of timm here")
    if not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "run timm.list_models() for the names"
        raise InputError(f"encoder '{name}'", "is not a network of timm", hint)


def timm_pyramid(config: EncoderConfig, **options: Any) -> nn.Module:
    """A timm network that takes any image size where it can.

    Args:
        config: name, output stride, and whether to ask the hub; weights from a path are not read here.
        options: further arguments of ``timm.create_model``.
    """
    import timm

    check_timm_name(config.name)
    if config.output_stride is not None:
        options["output_stride"] = config.output_stride
    try:
        return any_size(
            lambda size: timm.create_model(config.name, pretrained=config.weights == "hub", **size, **options)
        )
    except TypeError as error:
        rule, fix = f"cannot be built ({error})", "use another encoder"
        if "output_stride" in str(error):
            rule, fix = f"has no dilated form of output stride {config.output_stride}", "leave output_stride out"
        raise InputError(f"encoder '{config.name}'", rule, fix) from error
    except (OSError, RuntimeError) as error:
        if config.weights == "hub":
            raise hub_error(config, error) from error
        raise


def any_size(create: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """Build a timm network so that it takes images of any size, where its family can.

    Args:
        create: builds the network with the given further arguments.

    Raises:
        TypeError: the last one, if no family's arguments are taken.
    """
    # each family has its own word: plain vision transformers, window transformers, all others
    for words in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        try:
            return create(words)
        except TypeError as error:
            if not any(word in str(error) for word in (*words, "output_stride")):
                raise
    return create({})


def load_timm_weights(pyramid: nn.Module, config: EncoderConfig) -> LoadedWeights | None:
    """Read the weights of ``config`` into a timm feature extractor that ``timm_pyramid`` built."""
    import timm

    if config.weights == "none":
        return None
    if config.weights == "hub":
        return LoadedWeights("hub", len(pyramid.state_dict()))
    with torch.device("meta"):
        full_model = timm.create_model(config.name).state_dict()
    return load_backbone(pyramid, config.weights, full_model)


def hub_error(config: EncoderConfig, error: Exception) -> InputError:
    """The one line for a download that failed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    rule = f"weights cannot be fetched from the hub ({lines[0][:160]})"
    return InputError(f"encoder '{config.name}'", rule, "give the path of a weights file, or weights: none")
