"""What a recipe says about a network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Triple = tuple[float, float, float]


class ChannelStatistics(BaseModel):
    """Explicit normalisation ``(image - mean) / std``, red green blue, for images in [0,1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: Triple
    std: Triple

    @field_validator("std")
    @classmethod
    def _positive(cls, value: Triple) -> Triple:
        if min(value) <= 0:
            raise ValueError(f"std {list(value)} has a value that is not above 0")
        return value


NAMED_STATISTICS = {
    "imagenet": ChannelStatistics(mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "inception": ChannelStatistics(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "unit": ChannelStatistics(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}


class EncoderConfig(BaseModel):
    """Which backbone, where its weights come from, how images are normalised.

    Args:
        name: a timm name (``resnet50``, ``vit_small_patch16_224``), or ``hf:`` and a transformers architecture that
            is built in (``hf:mit_b0`` to ``hf:mit_b5``, ``hf:swin_tiny|small|base``, ``hf:dinov2_small|base|large``).
            Inside a ``NetworkConfig`` also ``smp:`` and a name of segmentation_models_pytorch (``smp:resnet34``).
        weights: ``none`` (random), a path to .safetensors, .pt, .pth or .bin, or ``hub`` (download of the publisher's
            weights, whose licence is the publisher's: the MiT weights on the hub are for non-commercial use).
        output_stride: largest stride of the pyramid, 8 or 16, by dilation; None leaves the backbone as published.
            For ``hf:mit_*`` the strided patch embeddings of the last stages become unstrided: 16 is the stride list
            [4,2,2,1]. Vision transformers of one stride refuse it.
        normalization: ``imagenet``, ``inception`` (mean and std 0.5, that is 2x-1), ``unit`` (none), or explicit mean
            and std; it must be the one that the weights were trained with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "resnet50"
    weights: str = "none"
    output_stride: Literal[8, 16] | None = None
    normalization: Literal["imagenet", "inception", "unit"] | ChannelStatistics = "imagenet"

    @property
    def statistics(self) -> ChannelStatistics:
        """The normalisation as numbers."""
        if isinstance(self.normalization, ChannelStatistics):
            return self.normalization
        return NAMED_STATISTICS[self.normalization]


class NetworkConfig(BaseModel):
    """A segmentation network.

    Args:
        architecture: ``deeplab_v2``, or a network of segmentation_models_pytorch by its lower-case name (``unet``,
            ``unetplusplus``, ``manet``, ``linknet``, ``fpn``, ``pspnet``, ``pan``, ``deeplabv3``, ``deeplabv3plus``,
            ``upernet``, ``segformer``, ``dpt``).
        encoder: backbone, its weights and normalisation. Its ``output_stride`` stays None: the architecture decides.
        decoder: further options of the architecture, by the names of segmentation_models_pytorch
            (``decoder_channels``, ``encoder_depth``, ...) or of ``DeepLabV2`` (``rates``, ``scales``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = "unet"
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    decoder: dict[str, Any] = Field(default_factory=dict)

    @field_validator("encoder")
    @classmethod
    def _stride_is_the_architectures(cls, value: EncoderConfig) -> EncoderConfig:
        if value.output_stride is not None:
            raise ValueError(
                "output_stride of a network's encoder is decided by the architecture; "
                "leave it out, or set decoder.encoder_output_stride where the architecture has that option"
            )
        return value
