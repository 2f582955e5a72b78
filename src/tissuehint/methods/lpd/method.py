"""LPD as a weak method."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.data.module import TissueData
from tissuehint.data.samples import Batch
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import MethodConfig, Training, kept_shares
from tissuehint.methods.lpd.config import LPDConfig
from tissuehint.methods.lpd.pictures import write_pictures
from tissuehint.methods.prototypes import PrototypeMethod
from tissuehint.nn.diversity import (
    Coverage,
    correlation_diversity_loss,
    jeffreys_diversity_loss,
    prototype_coverage,
)
from tissuehint.nn.prototype_network import LevelMaps
from tissuehint.nn.prototypes import by_class, merge_prototypes


class LPD(PrototypeMethod):
    """Train a classifier by prototypes together with the prototypes, and push those of a class apart.

    PBIP without bank and without second stage. L = L_CLS during the warm-up, then
    L_CLS + weight (L_FG + L_BG + sparsity mean M) + lambda_div L_div.

    Source: LPD, Learnable Prototypes with Diversity regularisation, arXiv 2512.05922.
    """

    Config: ClassVar[type[MethodConfig]] = LPDConfig
    config: LPDConfig

    def __init__(self, config: LPDConfig, labels: LabelSpace) -> None:
        super().__init__(config, labels, (config.prototypes_per_class,) * labels.num_tissue)
        # in the network, whose parameters the optimiser is given
        self.network.register_parameter("prototypes", nn.Parameter(torch.randn(sum(self.counts), self.dim)))
        channels = self.network.encoder.channels[-1]
        if config.diversity.prototypes == "raw" and channels != self.dim:
            rule = f"compares prototypes of {self.dim} features with {channels} channels of '{config.encoder.name}'"
            raise InputError("diversity.prototypes raw", rule, "write projected, or an image_encoder with as many")
        self._seen = torch.zeros(2, 2, dtype=torch.float64)  # sum and number of coverage and overlap in validation

    def prototypes(self) -> Tensor:
        """(L,D), trained."""
        found = self.network.prototypes
        assert isinstance(found, Tensor)
        return found

    @property
    def warming_up(self) -> bool:
        """Whether the classification loss is alone."""
        return self.global_step < self.config.warm_up

    # ---- training -------------------------------------------------------------------------------------------------

    def fit(self, run: Training, data: TissueData) -> None:
        """As every method.

        Raises:
            InputError: a warm-up that never ends.
        """
        if self.config.warm_up >= run.steps:
            rule = f"is not below the {run.steps} steps of stage1, so that matching and diversity never begin"
            fix = f"give less, such as {round(0.16 * run.steps)} (the paper's share), or more steps"
            raise InputError(f"method.warm_up {self.config.warm_up}", rule, fix)
        super().fit(run, data)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """``classification``; after the warm-up also the terms of the matching, and ``diversity``."""
        return self.losses_of(self.see(batch.images), batch)

    def losses_of(self, seen: LevelMaps, batch: Batch) -> dict[str, Tensor]:
        """``losses`` of maps that were seen."""
        terms = self.terms(seen, batch, matching=not self.warming_up)
        config = self.config.diversity
        if not self.warming_up and config.weight > 0 and self.config.prototypes_per_class > 1:
            terms["diversity"] = config.weight * self.diversity(seen, batch.need_tags())
        return terms

    def diversity(self, seen: LevelMaps, tags: Tensor) -> Tensor:
        """The diversity loss of the chosen form, without its weight."""
        config, prototypes = self.config.diversity, self.prototypes()
        if config.prototypes == "projected":
            prototypes = self.network.projected(self.network.levels - 1, prototypes)
        regions = self.regions(seen, tags)
        grouped = by_class(prototypes, self.counts)
        if config.form == "correlation":
            return correlation_diversity_loss(
                seen.features, grouped, regions, window=config.window, min_mass=config.min_mass
            )
        return jeffreys_diversity_loss(
            seen.features, grouped, regions, temperature=config.temperature, min_pixels=config.min_pixels
        )

    @torch.no_grad()
    def regions(self, seen: LevelMaps, tags: Tensor) -> Tensor:
        """The class with the largest logit, (B,h,w) int64 on the cells of the coarsest level; -1 where all are too low.

        Means of the logits over the prototypes of a class, against a constant; with ``gate_by_tags`` only of tagged
        classes.
        """
        config = self.config.diversity
        logits = merge_prototypes(seen.similarities[-1].float() * seen.scales[-1], self.counts)
        if config.gate_by_tags:
            logits = logits.masked_fill(tags[:, :, None, None] == 0, float("-inf"))
        highest, found = logits.max(1)
        return found.masked_fill(highest <= config.background, -1)

    # ---- how far the prototypes differ ----------------------------------------------------------------------------

    @torch.no_grad()
    def coverage(self, batch: Batch) -> Coverage:
        """How much of the regions the prototypes of each class see, together and in common."""
        return self.coverage_of(self.see(batch.images), batch.need_tags())

    def coverage_of(self, seen: LevelMaps, tags: Tensor) -> Coverage:
        """``coverage`` of maps that were seen."""
        return prototype_coverage(seen.similarities[-1], self.regions(seen, tags), self.counts)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """As every method; counts coverage and overlap too."""
        seen = self.see(batch.images)
        self.log_validation(self.losses_of(seen, batch), batch)
        for row, values in zip(self._seen, self.coverage_of(seen, batch.need_tags()), strict=True):
            known = values[values.isfinite()]
            row += torch.tensor([float(known.sum()), len(known)])

    def on_validation_epoch_end(self) -> None:
        """Log the means over classes and batches, as ``val_coverage`` and ``val_overlap``."""
        totals = self.trainer.strategy.reduce(self._seen.to(self.device, torch.float32), reduce_op="sum")
        for name, (total, number) in zip(("val_coverage", "val_overlap"), totals.tolist(), strict=True):
            if number > 0:
                self.log(name, total / number)
        self._seen.zero_()

    # ---- inference ------------------------------------------------------------------------------------------------

    def tissue_map(self, maps: Tensor, gate: Tensor, images: Tensor) -> Tensor:
        """From fused class maps to probabilities.

        p = softmax over the gated classes of M_c and the background (1 - max M)^10, refined by the CRF; the share of
        the background, which is no class, goes to the classes in proportion.

        Args:
            maps: (B,C,h,w) in [0,1].
            gate: (B,C) bool; an image without any gets zeros.
            images: (B,3,H,W) in [0,1].

        Returns:
            (B,K,H,W), K = C, or C + 1 with white.
        """
        fused = F.interpolate(maps.float(), images.shape[-2:], mode="bilinear", align_corners=False)
        open_classes = gate[:, :, None, None]
        scores = fused.masked_fill(~open_classes, -1e4)
        if self.config.background is not None:
            highest = (fused * open_classes).amax(1, keepdim=True)
            scores = torch.cat([scores, (1 - highest).clamp_min(0) ** self.config.background], 1)
        shares = scores.softmax(1)
        if self.config.crf is not None:
            shares = kept_shares(self.config.crf.refine(shares, images), shares)
        shares = shares[:, : self.labels.num_tissue] * open_classes
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-30)
        return self.config.split_white(shares, images, self.labels)

    def explained(self, batch: Batch, seen: LevelMaps) -> dict[str, Tensor]:
        """As ``PrototypeMethod.explain``; with tags also ``regions`` (B,N,h,w) in {0,1}, which the diversity is of."""
        found = super().explained(batch, seen)
        if batch.tags is not None:
            regions = self.regions(seen, batch.tags)
            one_hot = torch.stack([regions == number for number in range(self.labels.num_tissue)], 1).float()
            found["regions"] = self.network.on_image(one_hot, batch.images, self.network.levels - 1)
        return found

    @torch.no_grad()
    def illustrate(self, data: TissueData, folder: Path) -> None:
        """Heatmaps of every prototype, coverage and overlap of every class, for the report."""
        write_pictures(self, data, folder)
