"""What a recipe says about a network."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Triple = tuple[float, float, float]


class ChannelStatistics(BaseModel):
    """Explicit normalisation ``(image - mean) / std``, red green blue, for images in [0,1]."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
            Inside a ``NetworkConfig`` also ``smp:`` and a name of segmentation_models_pytorch (``smp:resnet34``),
            outside also ``resnet38d``, the wide backbone of AffinityNet, SEAM and the gland paper.
        weights: ``none`` (random), a path to .safetensors, .pt, .pth or .bin, or ``hub`` (download of the publisher's
            weights, whose licence is the publisher's: the MiT weights on the hub are for non-commercial use).
            ``resnet38d`` has none on a hub; it also reads the original .params file of MXNet.
        output_stride: largest stride of the pyramid, 8 or 16, by dilation; None leaves the backbone as published.
            For ``hf:mit_*`` the strided patch embeddings of the last stages become unstrided: 16 is the stride list
            [4,2,2,1]. Vision transformers of one stride refuse it. ``resnet38d`` always has 8.
        normalization: ``imagenet``, ``inception`` (mean and std 0.5, that is 2x-1), ``unit`` (none), or explicit mean
            and std; it must be the one that the weights were trained with.
        frozen_norm: all batch norms use their running statistics in training too and leave them as they are, and
            their affine parameters are not trained, as in the code of the gland paper and its parents. With
            ``weights: none`` the statistics are mean 0 and variance 1. Other norms are trained.
        frozen_levels: the stem and the first n maps of the pyramid are not trained (everything that these maps depend
            on, batch norms with their statistics). For ``resnet38d`` 1 is the first convolution and the blocks b2, as
            in the papers' code; for a ResNet of timm 1 is the stem, 2 is the stem and the first stage.
        depth: maps of the pyramid that are made, counted from the finest; None makes all. Coarse maps see far beyond
            their cells. What stands behind the last map is not built where the network can be cut, and else not
            trained.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "resnet50"
    weights: str = "none"
    output_stride: Literal[8, 16] | None = None
    normalization: Literal["imagenet", "inception", "unit"] | ChannelStatistics = "imagenet"
    frozen_norm: bool = False
    frozen_levels: int = Field(default=0, ge=0)
    depth: int | None = Field(default=None, ge=1)

    @property
    def statistics(self) -> ChannelStatistics:
        """The normalisation as numbers."""
        if isinstance(self.normalization, ChannelStatistics):
            return self.normalization
        return NAMED_STATISTICS[self.normalization]


def _trained_as_a_whole(encoder: EncoderConfig) -> EncoderConfig:
    """Refuse the keys that only encoders of class maps know."""
    for key in ("frozen_norm", "frozen_levels", "depth"):
        if getattr(encoder, key):
            raise ValueError(
                f"{key} is for encoders of class maps and has no effect in a network or trunk; leave it out"
            )
    return encoder


class TrunkConfig(BaseModel):
    """A convolutional trunk between a large image and a segmentation network.

    The "feature extractor" of Zhang, Burrows et al., Point-supervised segmentation with contrast-based variational
    models, CVPR 2023, section 4.1: ResNet-34 up to stride 16, so that a 4096 x 4096 image becomes 256 channels of
    256 x 256 cells.

    Args:
        encoder: a convolutional timm network, its weights and the normalisation of the images.
        stride: pixels of the (scaled) image per cell of the map; the last map of that stride is taken, and the stages
            behind it are not built.
        checkpointing: in training, keep the input of every block only and compute the rest again for the gradient:
            less memory, about one more forward pass of the trunk in time, the same gradients.
        frozen_norm: batch norms use their running statistics in training too and leave them as they are, because a
            large image comes alone in its batch; their affine parameters are trained. With ``weights: none`` the
            statistics are mean 0 and variance 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: EncoderConfig = Field(default_factory=lambda: EncoderConfig(name="resnet34"))
    stride: Literal[4, 8, 16, 32] = 16
    checkpointing: bool = True
    frozen_norm: bool = True

    @field_validator("encoder")
    @classmethod
    def _encoder_is_trained(cls, value: EncoderConfig) -> EncoderConfig:
        return _trained_as_a_whole(value)


class NetworkConfig(BaseModel):
    """A segmentation network.

    Args:
        architecture: ``deeplab_v2``, or a network of segmentation_models_pytorch by its lower-case name (``unet``,
            ``unetplusplus``, ``manet``, ``linknet``, ``fpn``, ``pspnet``, ``pan``, ``deeplabv3``, ``deeplabv3plus``,
            ``upernet``, ``segformer``, ``dpt``).
        encoder: backbone, its weights and normalisation. Its ``output_stride`` stays None, the architecture decides;
            its ``frozen_norm`` and ``frozen_levels`` stay unset.
        decoder: further options of the architecture, by the names of segmentation_models_pytorch
            (``decoder_channels``, ``encoder_depth``, ...) or of ``DeepLabV2`` (``rates``, ``scales``).
        scale: linear factor in (0, 1] by which images are shrunk before the network; logits are enlarged back to the
            image. 0.5 costs about a quarter of the time and memory.
        trunk: a convolutional trunk before the network, for images that are too large for it. The network then takes
            the channels of the trunk: its encoder has ``weights: none`` and its normalisation is not used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    architecture: str = "unet"
    encoder: EncoderConfig = Field(default_factory=EncoderConfig)
    decoder: dict[str, Any] = Field(default_factory=dict)
    scale: float = Field(default=1.0, gt=0, le=1)
    trunk: TrunkConfig | None = None

    @field_validator("encoder")
    @classmethod
    def _stride_is_the_architectures(cls, value: EncoderConfig) -> EncoderConfig:
        if value.output_stride is not None:
            raise ValueError(
                "output_stride of a network's encoder is decided by the architecture; "
                "leave it out, or set decoder.encoder_output_stride where the architecture has that option"
            )
        return _trained_as_a_whole(value)

    @model_validator(mode="after")
    def _behind_a_trunk(self) -> NetworkConfig:
        if self.trunk is None:
            return self
        if self.encoder.weights != "none":
            raise ValueError(
                f"encoder.weights {self.encoder.weights} do not fit behind a trunk: they expect the 3 channels of an "
                "image; set encoder.weights to none and give pretrained weights to trunk.encoder.weights"
            )
        if self.architecture == "deeplab_v2":
            raise ValueError(
                "deeplab_v2 takes the 3 channels of an image and cannot stand behind a trunk; "
                "use unet or another network of segmentation_models_pytorch, or leave trunk out"
            )
        return self
