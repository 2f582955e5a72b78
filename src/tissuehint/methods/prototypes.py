"""A classifier by prototypes with foreground/background matching, as a weak method: what pbip and lpd share."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tissuehint.data.samples import Batch
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import TagConfig, TagMethod
from tissuehint.nn.class_maps import ClassMaps
from tissuehint.nn.image_encoders import ImageEncoder, ImageEncoderConfig, build_image_encoder, feature_dim
from tissuehint.nn.masked_images import CHUNK, masked_image_losses
from tissuehint.nn.matching import Form, Pairs, adaptive_weights, class_pairs, drawn_pairs, prototype_pairs
from tissuehint.nn.optimization import Optimization, build_optimizer
from tissuehint.nn.prototype_network import LevelMaps, PrototypeNetwork, PrototypeSettings
from tissuehint.nn.prototypes import by_class, merge_prototypes


class MatchingConfig(BaseModel):
    """The matching branch: L = L_CLS + weight (foreground L_FG + background L_BG) + sparsity mean(M).

    Args:
        weight: beta of PBIP, Eq. 6; 0 leaves the branch out.
        foreground: theta_1 of Eq. 13; 0 leaves the loss out.
        background: theta_2 of Eq. 13; 0 leaves the loss out.
        threshold: delta of Eq. 4 (paper .15, released code .5); null weighs without threshold (Table 4, without AT).
        temperature: tau of Eq. 9 and 11 (paper 1, released code .07).
        form: ``class`` (Eq. 9-12: one pair for each tagged class) or ``prototype`` (released code: one pair for each
            prototype of a tagged class that scores above the mean of its class). See ``nn.matching``.
        maps: what is matched: the ``sum`` of all levels (Eq. 3), or the ``coarsest`` alone (released code).
        sparsity: weight of the mean of the matched maps (released code 5e-4; not in the paper).
        chunk: pairs that go through the frozen encoder at a time, which bounds the memory.
        max_pairs: at most so many pairs of a batch are matched, drawn at random in each step, which bounds the time;
            null matches all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = Field(default=0.5, ge=0)
    foreground: float = Field(default=1.0, ge=0)
    background: float = Field(default=0.5, ge=0)
    threshold: float | None = Field(default=0.15, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    form: Form = "class"
    maps: Literal["sum", "coarsest"] = "sum"
    sparsity: float = Field(default=0.0, ge=0)
    chunk: int = Field(default=CHUNK, ge=1)
    max_pairs: int | None = Field(default=None, ge=1)

    @property
    def used(self) -> bool:
        """Whether the frozen encoder has anything to do while training."""
        return self.weight > 0 and self.foreground + self.background > 0


class PrototypeConfig(TagConfig, PrototypeSettings):
    """The network, the frozen encoder, the matching branch, and how they are trained.

    Args:
        image_encoder: the frozen encoder that prototypes and masked images are compared in.
        matching: its losses.
        optimization: optimiser, learning rates, schedule (released codes: AdamW, 5e-5 for everything, weight decay
            1e-3, linear decay).
    """

    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    matching: MatchingConfig = MatchingConfig()
    optimization: Optimization = Optimization(learning_rate=5e-5, head_multiplier=1, weight_decay=1e-3, power=1)


class PrototypeMethod(TagMethod):
    """Train a classifier by prototypes on tags, match what its maps cut out with the prototypes, read its maps.

    A subclass gives ``prototypes``.

    Args:
        config: of the method.
        labels: the classes.
        counts: prototypes of each tissue class.
    """

    channels_last: ClassVar[bool] = True
    config: PrototypeConfig

    def __init__(self, config: PrototypeConfig, labels: LabelSpace, counts: tuple[int, ...]) -> None:
        super().__init__(config, labels)
        self.counts = counts
        self.dim = feature_dim(config.image_encoder)
        self.network = PrototypeNetwork(config, counts, self.dim)
        # outside of the modules: frozen, so neither trained nor saved with the weights; built where it is needed
        self._image_encoder: tuple[ImageEncoder, ...] = ()

    def prototypes(self) -> Tensor:
        """(L,D) in the space of the frozen encoder, classes in order."""
        raise NotImplementedError

    def encode(self, pictures: Tensor) -> Tensor:
        """Vectors (b,D) of pictures that are normalised for the frozen encoder, in the space of the prototypes."""
        return self.image_encoder.encode(pictures)

    @property
    def image_encoder(self) -> ImageEncoder:
        """The frozen encoder, on the device of the method; read from its file at the first use."""
        if not self._image_encoder:
            encoder = build_image_encoder(self.config.image_encoder)
            # the memory order that convolutions like best: about half the time on a CPU
            self._image_encoder = (encoder.to(memory_format=torch.channels_last),)
        return self._image_encoder[0].to(self.device)

    def see(self, images: Tensor) -> LevelMaps:
        """Similarity maps of the levels."""
        seen: LevelMaps = self.network(images, self.prototypes())
        return seen

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``classification``, ``foreground``, ``background``, ``sparsity``; each with its weight, 0 ones left out."""
        return self.terms(self.see(batch.images), batch)

    def terms(self, seen: LevelMaps, batch: Batch, *, matching: bool = True) -> dict[str, Tensor]:
        """The losses of maps that were seen; ``matching`` false gives the classification alone."""
        terms = {"classification": self._classification(seen, batch.need_tags())}
        if matching and self.config.matching.used:
            terms |= self._matching(seen, batch)
        return terms

    def class_maps(self, images: Tensor) -> ClassMaps:
        """Fused class maps (B,N,h,w) in [0,1], and the logits of the coarsest level (B,N), means as they are trained.

        Of each level the part above 0, min-max scaled per image and class to [0,1]; levels are averaged with
        ``fusion_weights`` at the resolution of the finest (released codes).
        """
        config, network = self.config, self.network
        seen = self.see(images)
        size: tuple[int, int] | None = None
        total: Tensor | None = None
        weights = config.fusion_weights[-network.levels :]
        for level, (maps, weight) in enumerate(zip(network.class_maps(seen, config.merge), weights, strict=True)):
            part = weight / sum(weights) * _to_unit_range(network.on_image(maps.float(), images, level))
            size = size or (part.shape[-2], part.shape[-1])
            part = F.interpolate(part, size, mode="bilinear", align_corners=False)
            total = part if total is None else total + part
        assert total is not None
        return ClassMaps(total, network.class_logits(seen)[-1])

    def activation(self, maps: Tensor) -> Tensor:
        """As they are: the levels are scaled before they are fused."""
        return F.relu(maps)

    def configure_optimizers(self) -> Any:
        """Encoder at the base rate; projections and factors at the head rate."""
        return build_optimizer(self.config.optimization, self.network, self.total_steps())

    @torch.no_grad()
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """How the class maps come about.

        ``class_maps`` as read; ``level_1``... the class maps of the levels, fine to coarse (B,N,h,w); ``prototypes``
        the similarities of the coarsest level (B,L,h,w) in [-1,1]; ``presence`` (B,N,1,1).
        """
        return self.explained(batch, self.see(batch.images))

    def explained(self, batch: Batch, seen: LevelMaps) -> dict[str, Tensor]:
        """``explain`` of maps that were seen."""
        fused, network = self.augmented(batch.images), self.network
        levels = network.class_maps(seen, self.config.merge)
        maps = {"class_maps": fused.maps}
        for number, each in enumerate(levels):
            maps[f"level_{number + 1}"] = _to_unit_range(network.on_image(each.float(), batch.images, number))
        maps["prototypes"] = network.on_image(seen.similarities[-1].float(), batch.images, network.levels - 1)
        return maps | {"presence": fused.logits.sigmoid()[:, :, None, None]}

    def _classification(self, seen: LevelMaps, tags: Tensor) -> Tensor:
        logits = self.network.class_logits(seen)
        weights = self.config.level_weights[-self.network.levels :]
        parts = [
            weight * F.binary_cross_entropy_with_logits(each.float(), tags)
            for each, weight in zip(logits, weights, strict=True)
            if weight > 0
        ]
        return torch.stack(parts).sum()

    def _matching(self, seen: LevelMaps, batch: Batch) -> dict[str, Tensor]:
        config, network, tags = self.config.matching, self.network, batch.need_tags()
        encoder, prototypes = self.image_encoder, self.prototypes()
        if config.form == "class":
            pairs, counts = class_pairs(tags), network.counts
        else:
            pairs, counts = prototype_pairs(tags, seen.logits[-1], network.counts), None
        pairs = drawn_pairs(pairs, config.max_pairs)
        maps = self._matched_maps(seen, pairs, counts, batch.images, encoder.side)
        front, back = adaptive_weights(maps, config.threshold)
        losses = masked_image_losses(
            front if config.foreground > 0 else None,
            back if config.background > 0 else None,
            encoder.normalization(encoder.resize(batch.images)).contiguous(memory_format=torch.channels_last),
            pairs,
            by_class(prototypes, self.counts),
            self.encode,
            temperature=config.temperature,
            form=config.form,
            counts=self.counts,
            chunk=config.chunk,
        )
        names = {"foreground": config.foreground, "background": config.background}
        terms = {
            name: config.weight * weight * loss
            for (name, weight), loss in zip(names.items(), losses, strict=True)
            if loss is not None
        }
        if config.sparsity > 0:
            terms["sparsity"] = config.weight * config.sparsity * (seen.similarities[-1] * seen.scales[-1]).mean()
        return terms

    def _matched_maps(
        self, seen: LevelMaps, pairs: Pairs, counts: tuple[int, ...] | None, images: Tensor, side: int
    ) -> Tensor:
        """(P,side,side), the map of each pair as the frozen encoder will see its image."""
        chosen = range(self.network.levels) if self.config.matching.maps == "sum" else [self.network.levels - 1]
        total: Tensor | None = None
        for level in chosen:
            maps = seen.similarities[level].float()
            if counts is not None:
                maps, index = merge_prototypes(maps, counts), pairs.classes
            else:
                assert pairs.own is not None
                index = self._first_prototype.to(pairs.classes.device)[pairs.classes] + pairs.own
            maps = self.network.on_image(maps, images, level)[pairs.images, index]
            part = F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
            total = part if total is None else total + part
        assert total is not None
        return total

    @property
    def _first_prototype(self) -> Tensor:
        return torch.tensor([0, *self.network.counts[:-1]]).cumsum(0)


def _to_unit_range(maps: Tensor) -> Tensor:
    """The part above 0 of (B,N,h,w), per image and class scaled so that its smallest value is 0 and its largest 1."""
    active = F.relu(maps)
    lowest, highest = active.amin((2, 3), keepdim=True), active.amax((2, 3), keepdim=True)
    return (active - lowest) / (highest - lowest).clamp_min(1e-6)
