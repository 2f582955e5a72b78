"""VSLP as a weak method."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.data.module import Supervision, TissueData
from tissuehint.data.samples import Batch
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.methods.base import MethodConfig, Training, WeakMethod
from tissuehint.methods.vslp.confidence import Confidence, best_temperature, proportion_losses
from tissuehint.methods.vslp.config import FusionConfig, VSLPConfig
from tissuehint.methods.vslp.energy import (
    LEAST,
    EdgeWeightedTotalVariation,
    FusionEnergy,
    FusionWeights,
    areas,
    average,
    disagreement,
    entropy,
)
from tissuehint.methods.vslp.flow import Flow, Projection, minimise
from tissuehint.methods.vslp.learning import RegulariserLearning
from tissuehint.methods.vslp.pictures import write_pictures
from tissuehint.methods.vslp.views import Seen, View, bring_back, canvas_size, look
from tissuehint.nn.optimization import build_optimizer
from tissuehint.ops.capacity import capacity_bias
from tissuehint.ops.variational_multiclass import segment_multiclass
from tissuehint.ops.white import white_masks

P = ParamSpec("P")
R = TypeVar("R")

#: Training images that choose the temperature of stage 1.
CALIBRATION_IMAGES = 128

#: The flow keeps the proportions of maps that are sharpened by this temperature, and ends with those of the argmax.
PROJECTION_TEMPERATURE, FINAL_TEMPERATURE = 0.1, 0.02

#: Areas that are held may be off by this, but for pixels that cannot be told apart.
AREA_TOLERANCE = 1e-3

#: What holds near-hard areas in the exact solver, in units of its costs.
NEAR_HARD = 100.0

#: Pixels that the exact solver decided keep so much of the confidence map: equal scores cannot be divided.
UNDECIDED = 1e-3

#: The exact solver is all but certain everywhere. Half and half with the confidence map of the same areas, which leaves
#: the likeliest class, a map says again how sure it is: for calibration, and for windows that overlap and are averaged.
CONFIDENCE_SHARE = 0.5

#: A step that lowers the energy not even at a 64th of its length is the last: on EBHI-Seg as good as with 20 halvings.
#: But the first, which is as long as the settings say, whatever the weights of the terms.
HALVINGS, FIRST_HALVINGS = 6, 20


def outside_inference_mode(function: Callable[Concatenate[VSLP, P], R]) -> Callable[Concatenate[VSLP, P], R]:
    """Leave the inference mode of a caller, whose tensors no flow could be followed on, and take no gradients."""

    @wraps(function)
    def called(self: VSLP, /, *words: P.args, **names: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(self, *words, **names)
        with torch.inference_mode(False), torch.no_grad():
            return function(self, *words, **names)

    return called


class VSLP(WeakMethod):
    """Train a network on tissue proportions, and fuse what it says of many views of an image by an energy.

    A reconstruction from the abstract (Effland et al., arXiv 2604.24347): neither the paper's text nor its code is
    public. See the README of this folder.
    """

    supervision: ClassVar[Supervision] = "proportions"
    Config: ClassVar[type[MethodConfig]] = VSLPConfig
    config: VSLPConfig
    temperature: Tensor

    def __init__(self, config: VSLPConfig, labels: LabelSpace) -> None:
        super().__init__(config, labels)
        fusion = config.fusion
        if fusion is not None and fusion.ground_cost is not None and len(fusion.ground_cost) != labels.num_tissue:
            rule = f"has {len(fusion.ground_cost)} classes, the data {labels.num_tissue} ({', '.join(labels.tissue)})"
            raise InputError("method.fusion.ground_cost", rule, "give one row a tissue class")
        self.network = Confidence(config.confidence, labels.num_tissue)
        self.fusion: FusionWeights | None = None
        if fusion is not None and fusion.regulariser.name == "total_deep_variation":
            self.fusion = FusionWeights(fusion, labels.num_tissue)
        self.register_buffer("temperature", torch.ones(()))

    # ---- training -------------------------------------------------------------------------------------------------

    def fit(self, run: Training, data: TissueData) -> None:
        """Stage 1, its temperature, and the learned part of the fusion; each is a phase that is done once."""
        confidence = run.phase("confidence")
        super().fit(confidence, data)
        if self.config.calibration:
            self.calibrate(data)
        learning = self.config.learning
        if self.fusion is None or learning.steps == 0:
            return
        phase = run.phase(
            "regulariser", steps=learning.steps, batch_size=learning.batch_size, round_steps=learning.round_steps
        )
        training = data.hints("train", self.supervision)
        data.train_on(training, batch_size=phase.batch_size, round_steps=phase.round_steps)
        phase.fit(RegulariserLearning(self), data)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Those of stage 1: ``proportions``, and ``entropy`` and ``presence`` where they have a weight."""
        logits, weights = self.network.drawn(batch.images, self.tissue(batch.images))
        return proportion_losses(logits, weights, batch.need_proportions(), self.config.losses)

    def configure_optimizers(self) -> Any:
        """Encoder at the base rate, all else of stage 1 at the head rate."""
        return build_optimizer(self.config.optimization, self.network, self.total_steps())

    @torch.no_grad()
    def calibrate(self, data: TissueData) -> None:
        """Choose the temperature on training images, by their proportions; nothing else is changed."""
        items = data.hints("train", self.supervision)
        count = min(len(items), CALIBRATION_IMAGES)
        chosen = [round(place * (len(items) - 1) / max(count - 1, 1)) for place in range(count)]
        training = self.training
        self.eval()
        seen: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for index in chosen:
            sample = items.sample(index)
            image = sample.image[None].to(self.device)
            logits, weights = self.network.drawn(image, self.tissue(image))
            assert sample.proportions is not None
            for rows, values in zip(seen, (logits[0], weights[0], sample.proportions), strict=True):
                rows.append(values.float().cpu())
        self.temperature.fill_(best_temperature(*seen))
        self.train(training)

    # ---- what the views say ---------------------------------------------------------------------------------------

    def tissue(self, images: Tensor) -> Tensor:
        """T (B,H,W): 1 on tissue, 0 on white where the label space has white; an image without tissue is all tissue."""
        if self.labels.white is None:
            return torch.ones_like(images[:, 0])
        config = self.config
        tissue = ~white_masks(images, threshold=config.white_threshold / 255, min_area=config.white_min_area)
        return (tissue | ~tissue.flatten(1).any(1)[:, None, None]).to(images)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Size (h,w) of the working grid."""
        height, width = images.shape[-2:]
        return -(-height // self.config.resolution), -(-width // self.config.resolution)

    @outside_inference_mode
    def see(self, images: Tensor, views: list[View] | None = None) -> Seen:
        """What the network says of views of images, on the working grid, in the frame of the images.

        Raises:
            InputError: an offset that moves the images out of sight.
        """
        image, size = (images.shape[-2], images.shape[-1]), self.grid(images)
        probabilities, validity = [], []
        for view in self.config.test_time.views() if views is None else views:
            if any(abs(shift) >= side for shift, side in zip(view.offset, canvas_size(view, *image), strict=True)):
                rule = f"moves images of {image[0]} x {image[1]} px out of sight"
                raise InputError(f"test_time.offsets {view.offset}", rule, f"use offsets below {min(image)}")
            cells = self.network(look(images, view))
            shares = (cells.logits.float() / self.temperature).softmax(1)
            moved, valid = bring_back(shares, view, image, cells.covered, size)
            probabilities.append(moved)
            validity.append(valid.expand(len(images), -1, -1))
        seen = Seen(torch.stack(probabilities, 1), torch.stack(validity, 1))
        unseen = (seen.validity.sum(1, keepdim=True) == 0).to(seen.validity)
        # a pixel that no view sees takes what is said of the border nearest to it
        return seen._replace(validity=seen.validity + unseen)

    @outside_inference_mode
    def energy(self, images: Tensor, seen: Seen, proportions: Tensor | None = None) -> FusionEnergy:
        """The energy of maps of images on the working grid; ``proportions`` (B,C) for the soft term."""
        fusion = self._fusion()
        size = self.grid(images)
        tissue = F.adaptive_avg_pool2d(self.tissue(images)[:, None], size)[:, 0]
        small = F.adaptive_avg_pool2d(images, size)
        soft = proportions if fusion.proportions == "soft" else None
        regulariser: Any = None
        if fusion.regulariser.name == "total_variation":
            regulariser = EdgeWeightedTotalVariation(fusion.regulariser, small)
        if self.fusion is None:
            return FusionEnergy(fusion, seen, tissue, regulariser, None, fusion.fidelity_weight, soft)
        guide = small if fusion.regulariser.guide == "image" else None
        return FusionEnergy(fusion, seen, tissue, self.fusion.regulariser, guide, self.fusion.log_fidelity.exp(), soft)

    # ---- tissue maps ----------------------------------------------------------------------------------------------

    @outside_inference_mode
    def predict(self, images: Tensor) -> Tensor:
        """Tissue map without proportions."""
        seen = self.see(images)
        return self._tissue_map(self._graded(self.fuse(images, seen=seen).u, images, seen), images)

    @outside_inference_mode
    def label_guided(self, batch: Batch) -> Tensor:
        """Tissue map with the proportions of the images; zero for an image whose proportions are all 0."""
        proportions = batch.need_proportions()
        known = proportions.sum(1) > 0
        # an image without proportions gets any, and no map
        filled = torch.where(known[:, None], proportions, 1 / proportions.shape[1])
        fusion = self.config.fusion
        held = filled if fusion is None or fusion.proportions == "near_hard" else None
        seen = self.see(batch.images)
        u = self._graded(self.fuse(batch.images, filled, seen).u, batch.images, seen)
        maps = self._tissue_map(u, batch.images, held)
        return maps * known[:, None, None, None]

    @outside_inference_mode
    @torch.no_grad()
    def fuse(self, images: Tensor, proportions: Tensor | None = None, seen: Seen | None = None) -> Flow:
        """Soft maps (B,C,h,w) on the working grid, and the energies on the way; ``seen`` if it is known already.

        Areas that are held are those of the map that is returned; its energies are of the flow before.
        """
        seen = self.see(images) if seen is None else seen
        start = average(seen, self.config.average)
        fusion = self.config.fusion
        if fusion is None:
            tissue = F.adaptive_avg_pool2d(self.tissue(images)[:, None], self.grid(images))[:, 0]
            found = Flow(start, start.new_zeros(1, len(start)))
            return found if proportions is None else self._with_areas(found, proportions, tissue)
        if fusion.proportions == "none":
            proportions = None
        energy = self.energy(images, seen, proportions)
        held = proportions if fusion.proportions == "near_hard" else None
        if proportions is None and fusion.areas == "confidence":
            held = areas(start, energy.tissue)
        if fusion.solver == "primal_dual":
            found = self._exact(energy, proportions if held is None else held, near_hard=held is not None)
            if held is not None:
                found = found._replace(u=found.u.lerp(start, UNDECIDED))
        else:
            # guesses hold the end alone: as good, and the flow stays cheap
            found = self._flow(energy, start, proportions)
        return found if held is None else self._with_areas(found, held, energy.tissue)

    @outside_inference_mode
    @torch.no_grad()
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """How a map comes about, on the working grid.

        ``confidence``: (B,C,h,w), average of the views; ``disagreement`` and ``entropy``: of the views, (B,1,h,w);
        ``soft_map``: (B,C,h,w), their fusion without proportions, and ``guided_map`` with those of the images, where
        the batch has some. Of the latter, or else the former: ``fidelity_energy``, and ``regularisation_energy`` less
        that of a flat map, which depends on the image alone, (B,1,h,w).
        ``proportion_energy``: (B,1,h,w) of the former, high where a pixel is of a class that is given less area.
        """
        images, proportions = batch.images, batch.proportions
        seen = self.see(images)
        start = average(seen, self.config.average)
        found = {
            "confidence": start,
            "disagreement": disagreement(seen, start)[:, None],
            "entropy": entropy(start)[:, None],
            "soft_map": self.fuse(images, seen=seen).u,
        }
        if proportions is not None:
            # an image without proportions keeps those of its free map
            tissue = F.adaptive_avg_pool2d(self.tissue(images)[:, None], self.grid(images))[:, 0]
            free = areas(found["soft_map"], tissue)
            proportions = torch.where(proportions.sum(1, keepdim=True) > 0, proportions, free)
            found["guided_map"] = self.fuse(images, proportions, seen).u
        if self.config.fusion is None:
            return found
        energy = self.energy(images, seen)
        shown = found.get("guided_map", found["soft_map"])
        for name, values in energy.terms(shown).items():
            found[f"{name}_energy"] = values[:, None]
        if "regularisation_energy" in found:
            found["regularisation_energy"] -= energy.guide_energy(shown)[:, None]
        if proportions is not None:
            found["proportion_energy"] = energy.proportion_map(found["soft_map"], proportions)[:, None]
        return found

    def illustrate(self, data: TissueData, folder: Path) -> None:
        """The energies of some images."""
        if self.config.fusion is not None:
            write_pictures(self, data, folder)

    # ---- small parts ----------------------------------------------------------------------------------------------

    def _fusion(self) -> FusionConfig:
        assert self.config.fusion is not None
        return self.config.fusion

    def _flow(self, energy: FusionEnergy, start: Tensor, proportions: Tensor | None) -> Flow:
        fusion = self._fusion()
        project: Projection | None = None
        if proportions is not None and fusion.proportions == "near_hard":
            wanted = proportions
            # the start has the areas already, and a step moves them by little
            logarithms = start.clamp_min(LEAST).log()
            bias = capacity_bias(logarithms, wanted, energy.tissue, temperature=PROJECTION_TEMPERATURE)
            start = (logarithms + bias[:, :, None, None]).softmax(1)

            def project(logarithms: Tensor) -> Tensor:
                bias = capacity_bias(
                    logarithms, wanted, energy.tissue, temperature=PROJECTION_TEMPERATURE, annealing=False
                )
                return logarithms + bias[:, :, None, None]

        step = fusion.step_size if self.fusion is None else self.fusion.log_step.detach().exp()
        return minimise(
            energy,
            start,
            fusion.steps,
            step_size=step,
            halvings=HALVINGS,
            first_halvings=FIRST_HALVINGS,
            project=project,
        )

    def _exact(self, energy: FusionEnergy, proportions: Tensor | None, *, near_hard: bool) -> Flow:
        """The minimiser of a convex energy by the primal-dual method."""
        fusion = self._fusion()
        # in units of the costs, in which the solver converges best
        unit = fusion.fidelity_weight * (1.0 if fusion.ground_cost is None else max(map(max, fusion.ground_cost)))
        # more than any class can gain at a pixel holds the proportions
        strength = NEAR_HARD if near_hard else fusion.proportion_weight / unit
        edges = energy.regulariser.edge if isinstance(energy.regulariser, EdgeWeightedTotalVariation) else None
        found = segment_multiclass(
            fusion.fidelity_weight / unit * energy.costs(),
            smoothness=0.0 if edges is None else fusion.regulariser.smoothness / unit,
            edge_weight=edges,
            weights=energy.tissue,
            proportions=proportions,
            strength=0.0 if proportions is None else strength,
        )
        return Flow(found.u, unit * found.energy[None])

    def _graded(self, u: Tensor, images: Tensor, seen: Seen) -> Tensor:
        """A map that says how sure it is, from one of the exact solver; others do."""
        if self.config.fusion is None or self.config.fusion.solver != "primal_dual":
            return u
        tissue = F.adaptive_avg_pool2d(self.tissue(images)[:, None], self.grid(images))[:, 0]
        sure = self._with_bias(average(seen, self.config.average), areas(u, tissue), tissue)
        return u.lerp(sure, CONFIDENCE_SHARE)

    def _with_areas(self, found: Flow, proportions: Tensor, tissue: Tensor) -> Flow:
        """Move the classes of a map by biases, so that the likeliest ones have these areas."""
        return found._replace(u=self._with_bias(found.u, proportions, tissue))

    def _with_bias(self, u: Tensor, proportions: Tensor, tissue: Tensor, *, annealing: bool = True) -> Tensor:
        logarithms = u.clamp_min(LEAST).log()
        bias = capacity_bias(
            logarithms,
            proportions,
            tissue,
            temperature=FINAL_TEMPERATURE,
            annealing=annealing,
            tolerance=AREA_TOLERANCE,
        )
        return (logarithms + bias[:, :, None, None]).softmax(1)

    def _tissue_map(self, u: Tensor, images: Tensor, proportions: Tensor | None = None) -> Tensor:
        """At the size of the images, where the areas of small classes would be smaller than on the working grid."""
        shares = F.interpolate(u, images.shape[-2:], mode="bilinear", align_corners=False)
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-8)
        if proportions is not None:
            tissue = self.tissue(images)
            shares = self._with_bias(shares, proportions, tissue, annealing=False)
        return self.config.split_white(self.config.refine(shares, images), images, self.labels)
