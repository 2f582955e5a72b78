"""Frozen image encoders: one interface for MedCLIP, CLIP, pathology foundation models and any network of timm."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.config import NAMED_STATISTICS, ChannelStatistics
from tissuehint.nn.encoders import Normalization
from tissuehint.nn.image_encoder_catalog import CATALOG, CatalogEncoder
from tissuehint.nn.image_towers import build_tower, check_name, timm_defaults, timm_dim
from tissuehint.nn.weights import DERIVED, LoadedWeights

__all__ = [
    "CATALOG",
    "CatalogEncoder",
    "ImageEncoder",
    "ImageEncoderConfig",
    "RandomEncoderWarning",
    "build_image_encoder",
    "feature_dim",
]


class RandomEncoderWarning(UserWarning):
    """An image encoder has random weights: its features say little about tissue."""


class ImageEncoderConfig(BaseModel):
    """Which frozen image encoder, where its weights come from, what it sees.

    MedCLIP's own normalisation, the default for ``medclip``, is one mean (0.586) and one std (0.280) for all three
    channels, because it was trained on grey chest X-rays. It also made images grey and padded them to a square, which
    is not done here: colour tells tissues apart. A method whose paper fed it images normalised in another way sets
    ``normalization``.

    Args:
        name: a name of the catalog (``tissuehint methods --encoders``), or any name of timm (``resnet50``,
            ``mobilenetv2_100``).
        weights: ``none`` (random, with a warning), ``hub`` (download of the publisher's weights under the publisher's
            licence), the path of a .safetensors, .pt, .pth or .bin file, or of a folder of a transformers checkpoint.
            Files of a whole image and text model (MedCLIP, CLIP, PLIP) are read too, without the text part.
        normalization: None is the encoder's own (for a name of timm that of its default weights); ``imagenet``,
            ``inception`` (mean and std 0.5), ``unit`` (none), or explicit mean and std.
        side: pixels a side that the encoder sees; None is its own.
        projection: a random linear projection without bias to this many features, not trained, drawn from ``seed``.
            ``swin_imagenet`` with 512 is what the released code of PBIP used in effect (it never read the weights of
            MedCLIP); the distribution is the same, the drawn numbers are not. Refused for encoders with a trained
            projection.
        seed: of random weights and of the random projection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "medclip"
    weights: str = "none"
    normalization: Literal["imagenet", "inception", "unit"] | ChannelStatistics | None = None
    side: int | None = Field(default=None, gt=0)
    projection: int | None = Field(default=None, gt=0)
    seed: int = 42

    @model_validator(mode="after")
    def _one_projection(self) -> ImageEncoderConfig:
        row = CATALOG.get(self.name)
        if self.projection is not None and row is not None and row.projected:
            raise ValueError(
                f"projection {self.projection}: image encoder '{self.name}' has a trained projection to {row.dim} "
                "features; leave projection out, or use swin_imagenet"
            )
        return self


class ImageEncoder(nn.Module):
    """A frozen network that turns an image into a vector.

    It is always in evaluation mode and none of its parameters is trained, but gradients flow through it to the images.
    The vector is, by encoder: the trained projection of the image embedding (MedCLIP, CLIP, PLIP); the class token
    (DINOv2, Phikon, UNI, H-optimus-0, GigaPath); the class token and the mean of the patch tokens one behind the other
    (Virchow, Virchow2); the pooled features before the classifier, head convolutions included (networks of timm). It is
    not L2-normalised.

    Attributes:
        config: as built.
        dim: D, length of the vector.
        side: pixels a side that the network sees.
        statistics: normalisation of the images.
        weights: what was read, or None for random weights.
    """

    dim: int
    side: int
    statistics: ChannelStatistics
    weights: LoadedWeights | None

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.dim = feature_dim(config)
        self.side = _side(config)
        self.statistics = _statistics(config)
        self.normalization = Normalization(self.statistics)
        with _seeded(config.seed):
            self.tower, self.weights = build_tower(config.name, config.weights)
        self.projection: nn.Module = nn.Identity()
        if config.projection is not None:
            self.projection = random_projection(_tower_dim(config), config.projection, config.seed)
        self.requires_grad_(False)
        self.train(False)
        if self.weights is None:
            _warn(config.name)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stay in evaluation mode, whatever ``mode`` says: dropout and batch statistics would change the vectors."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B,3,H,W) in [0,1] to vectors (B,D), float32, not L2-normalised.

        Images of another size are resized to ``side`` x ``side``: bilinear, antialiased where they shrink.

        Raises:
            InputError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            subject = f"images of shape {list(images.shape)}"
            raise InputError(subject, "image encoders take (B,3,H,W)", "give a batch of RGB images in [0,1]")
        return self.encode(self.normalization(self.resize(images)))

    def resize(self, images: Tensor) -> Tensor:
        """(B,3,H,W) to (B,3,side,side), without normalisation; unchanged where that is the size."""
        height, width = images.shape[-2:]
        if (height, width) == (self.side, self.side):
            return images
        shrinks = max(height, width) > self.side
        return F.interpolate(images, (self.side, self.side), mode="bilinear", antialias=shrinks)

    def encode(self, normalised: Tensor) -> Tensor:
        """Images (B,3,side,side) after resize and normalisation to vectors (B,D), float32, not L2-normalised.

        Raises:
            InputError: images of another size.
        """
        if tuple(normalised.shape[-3:]) != (3, self.side, self.side):
            subject = f"normalised images of shape {list(normalised.shape)}"
            rule = f"image encoder '{self.config.name}' takes (B,3,{self.side},{self.side}) here"
            raise InputError(subject, rule, "resize them first, or call the encoder itself")
        features: Tensor = self.projection(self.tower(normalised))
        return features.float()

    def fingerprint(self) -> str:
        """Sha256 of everything that decides the vectors: weights, random projection, side and normalisation.

        The same for the same weights from files of other names. Tensors that are computed at construction or unused
        in evaluation mode do not count.
        """
        what = {"dim": self.dim, "side": self.side, **self.statistics.model_dump(mode="json")}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            if name.endswith(DERIVED):
                continue
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def build_image_encoder(config: ImageEncoderConfig) -> ImageEncoder:
    """Build a frozen image encoder with the weights of its configuration; torch's generators stay where they are.

    Raises:
        InputError: unknown name, a side that the network does not take, missing or wrong weights, a hub that cannot be
            reached or wants a login.

    Example:
        >>> import torch, warnings
        >>> warnings.simplefilter("ignore", RandomEncoderWarning)
        >>> encoder = build_image_encoder(ImageEncoderConfig(name="mobilenetv3_small_050"))
        >>> encoder.dim, encoder.side
        (1024, 224)
        >>> tuple(encoder(torch.rand(2, 3, 50, 64)).shape)
        (2, 1024)
    """
    return ImageEncoder(config)


def feature_dim(config: ImageEncoderConfig) -> int:
    """D of the encoder of a configuration, without weights and without building the large ones.

    Raises:
        InputError: unknown name, or a side that the network does not take.

    Example:
        >>> feature_dim(ImageEncoderConfig(name="virchow2"))
        2560
    """
    dim = _tower_dim(config)
    return dim if config.projection is None else config.projection


def random_projection(features: int, projected: int, seed: int) -> nn.Linear:
    """A linear projection without bias, with the distribution that torch gives a new one, from a generator of its own.

    Args:
        features: length of the vectors before it.
        projected: and behind it.
        seed: of the generator.
    """
    with torch.device("meta"):
        linear = nn.Linear(features, projected, bias=False)
    # torch's nn.Linear: Kaiming uniform with a = sqrt(5), that is this bound
    bound = 1 / math.sqrt(features)
    numbers = torch.rand(projected, features, generator=torch.Generator().manual_seed(seed))
    linear.weight = nn.Parameter((2 * numbers - 1) * bound)
    return linear


def _tower_dim(config: ImageEncoderConfig) -> int:
    side = _side(config)
    row = CATALOG.get(config.name)
    return timm_dim(config.name, side) if row is None else row.dim


def _side(config: ImageEncoderConfig) -> int:
    """The side of a configuration; for the catalog checked here, for timm by a pass without numbers."""
    check_name(config.name)
    row = CATALOG.get(config.name)
    if row is None:
        return config.side or timm_defaults(config.name)[0]
    side = config.side or row.side
    smallest = max(row.smallest, row.multiple)
    if side < smallest or side % row.multiple:
        rule = f"image encoder '{row.name}' takes sides of {smallest} px or more that are multiples of {row.multiple}"
        raise InputError(f"side {side}", rule, f"use {row.side}, or leave side out")
    return side


def _statistics(config: ImageEncoderConfig) -> ChannelStatistics:
    if isinstance(config.normalization, ChannelStatistics):
        return config.normalization
    if config.normalization is not None:
        return NAMED_STATISTICS[config.normalization]
    row = CATALOG.get(config.name)
    return timm_defaults(config.name)[1] if row is None else row.statistics


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Networks built inside draw from ``seed``; afterwards torch's generators are where they were."""
    # torch.manual_seed would also move the generators of GPUs
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield


def _warn(name: str) -> None:
    row = CATALOG.get(name)
    fix = "weights: PATH or weights: hub" if row is None or row.hub else f"weights: PATH (from {row.page})"
    text = f"image encoder '{name}' has random weights, its features say little about tissue; give {fix}"
    warnings.warn(text, RandomEncoderWarning, stacklevel=4)
