r"""Learning the regulariser, the step size and lambda, from proportions alone.

The flow of some steps is followed, and its end asked to have the given proportions once it is sharpened, to be decided,
and to agree with what the views agree on (VSLP spec, Section 6, reconstructed):

weight_p D(pi, mean_T s(u_S)) + weight_c CE(consensus, u_S) + alpha mean_T H(u_S),     s(u) = softmax(log u / sharpness)

with a distance D that is 0 within a dead zone, for proportions that were rounded or are noisy. The consensus of an
image is the exact segmentation of the views that were drawn, with edge-weighted total variation and the given areas
(``ops.variational_multiclass``), dead zone or not: errors of the proportions cancel over many images, and areas within
the zone that are nearer to the views teach worse (docs/benchmarks.md). The flow itself sees a part of these views, and
nothing of the proportions: it learns to get without them where the convex energy gets with them. In the warm-up it
learns to mend label maps alone: the consensus, and, in every other step, partitions of smoothed noise. No mask is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.data.samples import Batch
from tissuehint.labels import IGNORE
from tissuehint.methods.vslp.confidence import proportion_distance
from tissuehint.methods.vslp.config import RegulariserConfig
from tissuehint.methods.vslp.energy import EdgeWeightedTotalVariation, FusionEnergy, average, entropy
from tissuehint.methods.vslp.flow import SMALLEST, mirror_step
from tissuehint.methods.vslp.views import Seen
from tissuehint.nn.optimization import polynomial
from tissuehint.ops.capacity import capacity_bias
from tissuehint.ops.variational_multiclass import segment_multiclass

if TYPE_CHECKING:
    from tissuehint.methods.vslp.method import VSLP

#: Temperature at which the consensus has the given areas, and the weight that holds them in the convex energy.
CONSENSUS_TEMPERATURE, AREA_STRENGTH = 0.02, 100.0

#: Made-up maps: cells of their noise along the shorter side, views of each, spread of the noise on their logarithms.
COARSEST, FINEST, DAMAGED_VIEWS, DAMAGE = 3, 10, 3, 1.0

#: Longest gradient of a step.
CLIP = 1.0


class RegulariserLearning(L.LightningModule):
    """The second phase of VSLP; what it trains is ``method.fusion``.

    Args:
        method: after stage 1; its network is left as it is.
    """

    def __init__(self, method: VSLP) -> None:
        super().__init__()
        assert method.fusion is not None
        self.fusion = method.fusion
        self._method = [method]  # in a list, so that its network is no part of this module
        self.learning = method.config.learning

    @property
    def method(self) -> VSLP:
        """Whose regulariser this is."""
        return self._method[0]

    def on_fit_start(self) -> None:
        """The network follows to the device, and into evaluation mode."""
        self.method.to(self.device).eval()
        self.fusion.train()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Sum of the terms; each is logged."""
        made_up = self.warming_up and self.global_step % 2 == 1
        terms = {"mending": self.mend(batch)} if made_up else self.terms(batch)
        total = torch.stack(list(terms.values())).sum()
        named = {f"train_{name}": value.detach() for name, value in terms.items()}
        named |= {"step_size": self.fusion.log_step.detach().exp(), "lambda": self.fusion.log_fidelity.detach().exp()}
        self.log("train_loss", total, prog_bar=True, on_step=True, on_epoch=False, batch_size=len(batch))
        self.log_dict(named, on_step=True, on_epoch=False, batch_size=len(batch))
        return total

    def configure_optimizers(self) -> Any:
        """Adam with a rate for the regulariser and one for the two scalars."""
        scalars = [self.fusion.log_step, self.fusion.log_fidelity]
        groups = [
            {"params": list(self.fusion.regulariser.parameters()), "lr": self.learning.learning_rate},
            {"params": scalars, "lr": self.learning.scalar_rate},
        ]
        total = int(self.trainer.estimated_stepping_batches)
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: polynomial(step, total, 0.9))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *words: Any, **names: Any) -> None:
        """A gradient through many steps of a flow can be long."""
        torch.nn.utils.clip_grad_norm_(self.fusion.parameters(), CLIP)

    @property
    def warming_up(self) -> bool:
        """Whether label maps are all that is learned from."""
        return self.global_step < self.learning.warm_up

    def terms(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms of a batch of images, by name."""
        method, learning = self.method, self.learning
        proportions = batch.need_proportions()
        with torch.no_grad():
            seen = method.see(batch.images, self._drawn_views())
            energy = method.energy(batch.images, seen)
            small = F.adaptive_avg_pool2d(batch.images, method.grid(batch.images))
            labels = consensus(seen, small, proportions, energy.tissue, learning.smoothness, learning.confidence)
            part = 1 + int(torch.randint(seen.validity.shape[1], ()))
            shown = part_of(seen, part)
        u = self.flow(method.energy(batch.images, shown), average(shown, method.config.average))
        consensus_weight = 1.0 if self.warming_up else learning.consensus_weight
        terms = {"consensus": consensus_weight * label_loss(u, labels)}
        if self.warming_up:
            return terms
        sharp = (u.clamp_min(SMALLEST).log() / learning.sharpness).softmax(1)
        distance = proportion_distance(energy.mean(sharp), proportions, "l1", learning.dead_zone)
        terms["proportions"] = learning.proportion_weight * distance.mean()
        share = energy.tissue / energy.tissue.sum((1, 2), keepdim=True).clamp_min(1e-8)
        terms["entropy"] = self._entropy_weight() * (entropy(u.clamp_min(SMALLEST)) * share).sum((1, 2)).mean()
        return terms

    def mend(self, batch: Batch) -> Tensor:
        """Loss on made-up label maps that the flow sees damaged; of the images it takes the size alone."""
        method = self.method
        with torch.no_grad():
            size = method.grid(batch.images)
            labels = partitions(len(batch), method.labels.num_tissue, size, self.device)
            seen = damaged(labels, method.labels.num_tissue)
            # a made-up map has no image, so that the guide says nothing
            images = torch.full_like(batch.images, 0.5)
            energy = method.energy(images, seen)
        return label_loss(self.flow(energy, average(seen, method.config.average)), labels)

    def flow(self, energy: FusionEnergy, start: Tensor) -> Tensor:
        """The end of the flow, without backtracking and with gradients towards what is learned."""
        assert self.method.config.fusion is not None
        u = start.detach()
        for _ in range(self.method.config.fusion.steps):
            u = mirror_step(u, energy.gradient(u.requires_grad_() if u.is_leaf else u), self.fusion.log_step.exp())
        return u

    def _drawn_views(self) -> list[Any]:
        views = self.method.config.test_time.views()
        order = torch.randperm(len(views))[: self.learning.views].tolist()
        return [views[index] for index in order]

    def _entropy_weight(self) -> float:
        done = self.global_step / max(int(self.trainer.estimated_stepping_batches), 1)
        return self.learning.entropy_weight * (0.1 + 0.9 * done)


def part_of(seen: Seen, count: int) -> Seen:
    """The first views; pixels that none of these sees count as seen by all of them."""
    validity = seen.validity[:, :count]
    unseen = (validity.sum(1, keepdim=True) == 0).to(validity)
    return Seen(seen.probabilities[:, :count], validity + unseen)


def consensus(
    seen: Seen, images: Tensor, proportions: Tensor, tissue: Tensor, smoothness: float, confidence: float = 0.0
) -> Tensor:
    """Labels (B,h,w) int64 that are smooth and have the given areas; 255 where no class is likely enough.

    They minimise sum_x T(x) <1 - p(x), u(x)> + smoothness sum_x g(x) sum_c |grad u_c(x)| with mean_T u = pi, for the
    mean p of the views.

    Args:
        seen: the views on the working grid.
        images: (B,3,h,w) on the working grid, whose edges are g.
        proportions: pi (B,C).
        tissue: T (B,h,w) in [0,1].
        smoothness: weight of the total variation, px of boundary against px of area.
        confidence: least probability.
    """
    edges = EdgeWeightedTotalVariation(RegulariserConfig(name="total_variation", smoothness=smoothness), images).edge
    found = segment_multiclass(
        1 - average(seen, "mean"),
        smoothness=smoothness,
        edge_weight=edges,
        weights=tissue,
        proportions=proportions,
        strength=AREA_STRENGTH,
    )
    logarithms = found.u.clamp_min(SMALLEST).log()
    bias = capacity_bias(logarithms, proportions, tissue, temperature=CONSENSUS_TEMPERATURE)
    likely, labels = (logarithms + bias[:, :, None, None]).softmax(1).max(1)
    return labels.masked_fill((likely < confidence) | (tissue < 0.5), IGNORE)


def label_loss(u: Tensor, labels: Tensor) -> Tensor:
    """Mean - log u at the labelled pixels (B,h,w); 0 where there is none."""
    counted = labels != IGNORE
    chosen = u.clamp_min(SMALLEST).log().gather(1, labels.masked_fill(~counted, 0)[:, None])[:, 0]
    return -(chosen * counted).sum() / counted.sum().clamp_min(1)


def partitions(count: int, classes: int, size: tuple[int, int], device: torch.device) -> Tensor:
    """Label maps (B,h,w) made up of smoothed noise, of coarse to fine structure."""
    cells = int(torch.randint(COARSEST, FINEST + 1, ()))
    noise = torch.randn(count, classes, cells, cells) + 0.5 * torch.randn(count, classes, 1, 1)
    return F.interpolate(noise, size, mode="bicubic", align_corners=False).argmax(1).to(device)


def damaged(labels: Tensor, classes: int) -> Seen:
    """Views of label maps as a network of coarse cells would give them: blocks, moved, blurred, and in part wrong."""
    sharp = F.one_hot(labels, classes).movedim(-1, 1).float()
    size = (labels.shape[1], labels.shape[2])
    views = []
    for _ in range(DAMAGED_VIEWS):
        side = int(torch.randint(2, 5, ()))
        top, left = torch.randint(side, (2,)).tolist()  # where in a cell the map begins
        bottom, right = -(size[0] + top) % side, -(size[1] + left) % side
        cells = F.avg_pool2d(F.pad(sharp, (left, right, top, bottom), mode="replicate"), side)
        noise = DAMAGE * torch.randn(cells.shape).to(cells)
        wrong = ((cells.clamp_min(0.02).log() + noise) / 2).softmax(1)
        wide = F.interpolate(wrong, scale_factor=side, mode="bilinear", align_corners=False)
        views.append(wide[:, :, top : top + size[0], left : left + size[1]])
    seen = torch.stack(views, 1)
    return Seen(seen, torch.ones_like(seen[:, :, 0]))
