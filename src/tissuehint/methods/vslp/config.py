"""Settings of VSLP and of the methods that it is compared with."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tissuehint.methods.base import WhiteConfig
from tissuehint.methods.vslp.views import ViewConfig
from tissuehint.nn.config import EncoderConfig, NetworkConfig
from tissuehint.nn.optimization import Optimization

FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TileConfig(BaseModel):
    """Tiles that a classifier sees one at a time (PropSegNet: tiles of 150 px, seen with 37 px around them).

    Args:
        stride: side of a tile in px; it has one class distribution.
        side: of what the classifier sees, with the tile in the middle.
        in_training: tiles of an image that a training step sees, drawn anew each time; None sees all. The proportions
            of a part of the tiles are those of the image with some noise, at a fraction of the memory.
    """

    model_config = FROZEN

    stride: int = Field(default=150, ge=1)
    side: int = Field(default=224, ge=32)
    in_training: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _around(self) -> TileConfig:
        if self.side < self.stride:
            raise ValueError(f"side {self.side} is smaller than the tiles of stride {self.stride}")
        return self


class ConfidenceConfig(BaseModel):
    """Stage 1: a network that gives each cell of an image a class distribution, trained on proportions.

    Args:
        cells: ``tokens``, the cells of the encoder's feature map (for patches); ``tiles``, each classified by itself
            (for large images); or ``pixels``, those of a segmentation network (Semantic Proportions).
        encoder: of tokens and tiles; any timm or transformers backbone.
        levels: how many of the coarsest pyramid levels are concatenated, at the resolution of the finest of them.
        dropout: on the features.
        centred: bring tokens to the middle of the pixels that they stand for (``nn.receptive_field``); those of most
            CNNs look up to half a token above and to the left of it. Nothing changes for Swin and ViT.
        tiles: size, where ``cells`` is ``tiles``.
        network: where ``cells`` is ``pixels``.
    """

    model_config = FROZEN

    cells: Literal["tokens", "tiles", "pixels"] = "tokens"
    encoder: EncoderConfig = Field(default_factory=lambda: EncoderConfig(name="swin_tiny_patch4_window7_224"))
    levels: int = Field(default=1, ge=1, le=4)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    centred: bool = True
    tiles: TileConfig = TileConfig()
    network: NetworkConfig | None = None

    @model_validator(mode="after")
    def _network_of_pixels(self) -> ConfidenceConfig:
        if (self.cells == "pixels") != (self.network is not None):
            raise ValueError("network belongs to cells: pixels, and nothing else; give both or neither")
        return self


class ProportionLosses(BaseModel):
    """What trains stage 1.

    Args:
        form: distance of predicted and given proportions: ``cross_entropy`` (soft target), ``l1``, ``l2``, or
            ``wasserstein`` (ground cost 1 between any two classes: half of ``l1`` summed over classes).
        dead_zone: errors of a share up to this cost nothing, for proportions that are rounded; 0 for exact ones. Not
            with ``cross_entropy``.
        entropy_weight: of the mean entropy of the cells, which asks each of them to decide.
        presence_weight: of the presence loss: a class that is given as absent nowhere, one that is given as present
            somewhere (the multiple-instance loss of learning from label proportions, with ``presence_above`` 0).
        presence_above: share above which a class must be seen; between 0 and this nothing is asked.
    """

    model_config = FROZEN

    form: Literal["cross_entropy", "l1", "l2", "wasserstein"] = "cross_entropy"
    dead_zone: float = Field(default=0.0, ge=0, lt=1)
    entropy_weight: float = Field(default=0.01, ge=0)
    presence_weight: float = Field(default=0.1, ge=0)
    presence_above: float = Field(default=0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _dead_zone_of_differences(self) -> ProportionLosses:
        if self.dead_zone and self.form == "cross_entropy":
            raise ValueError("dead_zone has no meaning for cross_entropy; use form: l1, or leave it out")
        return self


class RegulariserConfig(BaseModel):
    """What makes a tissue map likely.

    Args:
        name: ``total_deep_variation`` (learned), ``total_variation`` (by hand), or ``none``.
        features, macro_blocks, scales: size of the learned one (Kobler et al.: 32, 3, 3; 16, 1, 3 for few images).
        guide: what the learned one sees beside the map: the ``image`` on the working grid, or ``none``.
        smoothness: weight of the total variation, px of boundary against px of area.
        edge_factor: of its edge weight 1 / (1 + factor |grad image|^2) on the grey image; 0 for no edges.
    """

    model_config = FROZEN

    name: Literal["total_deep_variation", "total_variation", "none"] = "total_deep_variation"
    features: int = Field(default=16, ge=1)
    macro_blocks: int = Field(default=1, ge=1)
    scales: int = Field(default=3, ge=1)
    guide: Literal["image", "none"] = "image"
    smoothness: float = Field(default=0.2, ge=0)
    edge_factor: float = Field(default=100.0, ge=0)


class FusionConfig(BaseModel):
    """Stage 2: the energy whose minimiser fuses the views.

    Args:
        fidelity: distance of the map to the views: ``wasserstein`` to each of them (Section 4 of the spec), ``linear``
            (transport to one-hot maps, exact and convex), or ``log`` (mean logarithm of the views).
        ground_cost: between classes, a square matrix with 0 on its diagonal, for ``wasserstein`` and ``linear``; None
            is 1 between any two classes, in closed form. With ``wasserstein`` others take Sinkhorn's iteration at every
            pixel, and go with regularisers that are not learned.
        epsilon: of Sinkhorn's iteration, as a share of the largest cost.
        view_entropy: h0, views count less where they are undecided, by exp(-entropy / h0); None weighs all alike.
        fidelity_weight: lambda; the learned regulariser starts from it and learns its own.
        proportions: how those of an image are used where they are known: ``near_hard`` (every map of the flow has
            them), ``soft`` (the term ``proportion_weight`` pixels W(mean u, pi)), or ``none``.
        proportion_weight: gamma of ``soft``.
        areas: of the classes where the proportions of an image are not known: those of the ``confidence`` map, which
            stage 1 learned (class biases move the end of the flow), or ``free``. Left free they drift towards the
            larger class: a map a little better, its proportions a little worse (docs/benchmarks.md).
        regulariser: its kind and size.
        solver: ``flow``, or ``primal_dual``, the exact one for ``linear`` or ``log`` with total variation.
        steps: of the flow.
        step_size: first step of the flow; the learned regulariser starts from it and learns its own.
    """

    model_config = FROZEN

    fidelity: Literal["wasserstein", "linear", "log"] = "wasserstein"
    ground_cost: tuple[tuple[float, ...], ...] | None = None
    epsilon: float = Field(default=0.05, ge=1e-6)
    view_entropy: float | None = Field(default=None, gt=0)
    fidelity_weight: float = Field(default=1.0, gt=0)
    proportions: Literal["near_hard", "soft", "none"] = "near_hard"
    proportion_weight: float = Field(default=5.0, ge=0)
    areas: Literal["confidence", "free"] = "confidence"
    regulariser: RegulariserConfig = RegulariserConfig()
    solver: Literal["flow", "primal_dual"] = "flow"
    steps: int = Field(default=10, ge=1)
    step_size: float = Field(default=0.5, gt=0)

    @model_validator(mode="after")
    def _exact_solver_is_for_convex_energies(self) -> FusionConfig:
        learned = self.regulariser.name == "total_deep_variation"
        if self.solver == "primal_dual" and (self.fidelity == "wasserstein" or learned):
            raise ValueError(
                "primal_dual solves fidelity linear or log with regulariser total_variation or none; use solver: flow"
            )
        if self.fidelity == "wasserstein" and self.ground_cost is not None and learned:
            raise ValueError(
                "ground_cost with fidelity wasserstein has no second derivatives, from which total_deep_variation "
                "could learn; use fidelity: linear, or regulariser.name: total_variation"
            )
        if self.solver == "primal_dual" and self.proportions == "soft" and self.ground_cost is not None:
            raise ValueError(
                "primal_dual has soft proportions at the cost 1 between any two classes alone; leave ground_cost out, "
                "or use proportions: near_hard, or solver: flow"
            )
        if self.fidelity == "log" and self.ground_cost is not None:
            raise ValueError("ground_cost has no meaning for fidelity log; leave it out")
        cost = self.ground_cost
        if cost is not None and any(len(row) != len(cost) or row[place] != 0 for place, row in enumerate(cost)):
            raise ValueError("ground_cost is no square matrix with 0 on its diagonal")
        if cost is not None and (min(map(min, cost)) < 0 or max(map(max, cost)) <= 0):
            raise ValueError("ground_cost needs entries of at least 0, and one above")
        return self


class LearningConfig(BaseModel):
    """How the regulariser, the step size and lambda are learned, from proportions alone.

    Args:
        steps: optimiser steps; 0 leaves the regulariser as it was drawn, which is of no use.
        batch_size: None takes that of stage 1.
        round_steps: steps between two checkpoints; None takes those of stage 1.
        views: of an image that a step sees, drawn from all.
        warm_up: steps at the beginning that learn to mend damaged label maps alone, every other one of them maps that
            are made up.
        smoothness: of the total variation in the consensus that teaches the flow, px of boundary against px of area.
        confidence: pixels whose likeliest class has this much of the consensus teach the flow.
        consensus_weight: of what they teach, after the warm-up.
        proportion_weight: of the distance between given proportions and those of the sharpened map.
        dead_zone: errors of a share up to this cost nothing in that distance (rounding to 5 %: .025, to 10 %: .05); the
            consensus has the given areas all the same, which teaches better.
        entropy_weight: of the entropy of the map, reached linearly over the steps from a tenth of it.
        sharpness: exponent 1/s of the sharpened map (spec, Section 6: .3).
        learning_rate: of the regulariser.
        scalar_rate: of step size and lambda.
    """

    model_config = FROZEN

    steps: int = Field(default=300, ge=0)
    batch_size: int | None = Field(default=None, ge=1)
    round_steps: int | None = Field(default=None, ge=1)
    views: int = Field(default=4, ge=1)
    warm_up: int = Field(default=40, ge=0)
    smoothness: float = Field(default=0.5, ge=0)
    confidence: float = Field(default=0.0, ge=0, lt=1)
    consensus_weight: float = Field(default=1.0, ge=0)
    proportion_weight: float = Field(default=0.3, ge=0)
    dead_zone: float = Field(default=0.0, ge=0, lt=1)
    entropy_weight: float = Field(default=0.0, ge=0)
    sharpness: float = Field(default=0.3, gt=0, le=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    scalar_rate: float = Field(default=1e-2, gt=0)


class VSLPConfig(WhiteConfig):
    """Variational segmentation from label proportions.

    Args:
        confidence: stage 1, the network.
        losses: what trains it.
        test_time: views of an image whose class distributions are fused.
        average: of the views, where the flow starts and where there is no fusion: ``mean``, or ``log`` (geometric).
        resolution: px of the image per pixel of the working grid.
        calibration: choose the temperature of stage 1 on training images, so that mean probabilities match the
            proportions.
        fusion: stage 2; None ends with the average of the views (and, where the proportions of an image are known, with
            the likeliest classes that have these areas).
        learning: of the regulariser.
        optimization: of stage 1.
    """

    name: Literal["vslp"] = "vslp"
    confidence: ConfidenceConfig = ConfidenceConfig()
    losses: ProportionLosses = ProportionLosses()
    test_time: ViewConfig = ViewConfig()
    average: Literal["mean", "log"] = "log"
    resolution: int = Field(default=4, ge=1, le=16)
    calibration: bool = True
    fusion: FusionConfig | None = FusionConfig()
    learning: LearningConfig = LearningConfig()
    optimization: Optimization = Optimization()
