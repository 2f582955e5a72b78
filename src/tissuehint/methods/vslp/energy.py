r"""The energy of a tissue map, pixel by pixel, so that it can be looked at.

E(u) = lambda sum_x T(x) sum_t w_t(x) W_C(u(x), p_t(x)) + sum_x r(u)(x) + gamma |T| W(mean_T u, pi)

for u(x) in the simplex (reconstructed from the abstract of VSLP: Wasserstein fidelity to the views p_t, regulariser r,
proportions pi over the tissue T). With the ground cost 1 between any two classes W(a, b) = ||a - b||_1 / 2, smoothed
here by |s| = sqrt(s^2 + SMOOTHING^2) - SMOOTHING; other costs take entropic transport at every pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.methods.vslp.config import FusionConfig, RegulariserConfig
from tissuehint.methods.vslp.total_deep_variation import TotalDeepVariation
from tissuehint.methods.vslp.views import Seen
from tissuehint.ops.sinkhorn import transport

#: Of the absolute value and of the length of a gradient (VSLP spec, Section 4).
SMOOTHING = 1e-2

#: Of the transport of a pixel to a view; fewer are needed from the potentials of a map nearby.
TURNS = 20

#: Views never say that a class is impossible: below the first, a logarithm falls at this share of its slope, so that
#: pixels that are sure keep their order.
SMALLEST, SLOPE, LEAST = 1e-4, 0.01, 1e-30


class EdgeWeightedTotalVariation:
    """r(u) = smoothness sum_c g |grad u_c|, smoothed; g = 1 / (1 + factor |grad I|^2) of the grey image I.

    Args:
        config: weight and edge factor.
        images: (B,3,h,w) on the working grid.
    """

    def __init__(self, config: RegulariserConfig, images: Tensor) -> None:
        down, right = differences(images.mean(1, keepdim=True))
        self.edge = 1 / (1 + config.edge_factor * (down.square() + right.square()))[:, 0]
        self.smoothness = config.smoothness

    def energy(self, u: Tensor) -> Tensor:
        """(B,h,w) of maps (B,C,h,w)."""
        down, right = differences(u)
        length = (down.square() + right.square() + SMOOTHING**2).sqrt() - SMOOTHING
        return self.smoothness * self.edge * length.sum(1)


@dataclass(frozen=True)
class FusionEnergy:
    """The energy of maps of a batch of images.

    Args:
        config: which terms.
        seen: the views on the working grid.
        tissue: T (B,h,w) in [0,1].
        regulariser: learned, by hand, or None.
        guide: (B,G,h,w) of the learned one, or None.
        fidelity_weight: lambda.
        proportions: (B,C) of the term ``soft``, or None.
        potentials: of the last transport between maps and views, from which that of the next, similar map starts.
    """

    config: FusionConfig
    seen: Seen
    tissue: Tensor
    regulariser: TotalDeepVariation | EdgeWeightedTotalVariation | None
    guide: Tensor | None
    fidelity_weight: float | Tensor
    proportions: Tensor | None = None
    potentials: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def energy(self, u: Tensor) -> Tensor:
        """(B,h,w)."""
        return torch.stack(list(self.terms(u).values())).sum(0)

    def terms(self, u: Tensor) -> dict[str, Tensor]:
        """``fidelity``, ``regularisation`` and, where proportions are known and soft, ``proportion``: (B,h,w) each.

        The last one belongs to no pixel; it is spread over the tissue.
        """
        found = {"fidelity": self.fidelity_weight * self.tissue * self.fidelity(u)}
        if isinstance(self.regulariser, TotalDeepVariation):
            found["regularisation"] = self.regulariser.energy(u, self.guide)
        elif self.regulariser is not None:
            found["regularisation"] = self.regulariser.energy(u)
        if self.proportions is not None:
            distance = self.area_distance(u, self.proportions)
            found["proportion"] = self.config.proportion_weight * self.tissue * distance[:, None, None]
        return found

    def guide_energy(self, u: Tensor) -> Tensor:
        """What the learned regulariser says of the image alone, r of a flat map, (B,h,w); 0 without a guide.

        The same for every map ``u`` (B,C,h,w) of these images: no minimiser changes without it, and pictures show more.
        """
        if isinstance(self.regulariser, TotalDeepVariation) and self.guide is not None:
            return self.regulariser.energy(torch.full_like(u, 1 / u.shape[1]), self.guide)
        return torch.zeros_like(u[:, 0])

    def gradient(self, u: Tensor) -> Tensor:
        """Derivative of the sum over pixels, like ``u``; differentiable where gradients are on.

        Transport with a ground cost has no second derivatives here: its potentials count as constants.
        """
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            # a clone of what inference mode made has gradients
            at = u if keep and u.requires_grad else u.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.energy(at).sum(), at, create_graph=keep)
        return gradient

    def mean(self, u: Tensor) -> Tensor:
        """Mean of u over the tissue (B,C)."""
        return (u * self.tissue[:, None]).sum((2, 3)) / self.tissue.sum((1, 2))[:, None].clamp_min(1e-8)

    def area_distance(self, u: Tensor, proportions: Tensor) -> Tensor:
        """W_C(mean_T u, pi) of each image, (B,)."""
        mean = self.mean(u)
        if self.config.ground_cost is None:
            return smooth_distance(mean, proportions)
        mean = mean / mean.sum(1, keepdim=True)
        cost = u.new_tensor(self.config.ground_cost)
        return transport(mean, proportions, cost, epsilon=self.config.epsilon).value.to(u)

    def proportion_map(self, u: Tensor, proportions: Tensor) -> Tensor:
        """The term gamma |T| W(mean_T u, pi) dealt out to the pixels by the dual potentials, (B,h,w).

        gamma T(x) (<f, u(x)> + <g, pi>) with the optimal potentials: it sums to the term (with its entropy), is high
        where u(x) is of a class that is given less area, and may be below 0 where it is of one that is given more.
        """
        ground = self.config.ground_cost
        classes = u.shape[1]
        cost = 1 - torch.eye(classes, device=u.device) if ground is None else u.new_tensor(ground)
        mean = self.mean(u)
        found = transport(mean / mean.sum(1, keepdim=True), proportions, cost, epsilon=self.config.epsilon)
        given = (found.potentials.target * proportions).sum(1)[:, None, None]
        spent = torch.einsum("bchw,bc->bhw", u, found.potentials.source.to(u))
        return self.config.proportion_weight * self.tissue * (spent + given)

    def fidelity(self, u: Tensor) -> Tensor:
        """Distance of every pixel to its views, (B,h,w)."""
        config, weights = self.config, self.view_weights()
        if config.fidelity != "wasserstein":
            return (self.costs() * u).sum(1)
        views = self.seen.probabilities
        if config.ground_cost is None:
            distance = smooth_distance(u[:, None], views, axis=2)
        else:
            distance = self._transported(u[:, None].expand_as(views), views, config.ground_cost)
        return (weights * distance).sum(1)

    def costs(self) -> Tensor:
        """Linear cost c (B,C,h,w) of the classes: sum_t w_t C p_t, or - sum_t w_t log p_t."""
        views, weights = self.seen.probabilities, self.view_weights()[:, :, None]
        if self.config.fidelity == "log":
            return -(weights * bounded_log(views)).sum(1)
        mean = (weights * views).sum(1)
        if self.config.ground_cost is None:
            return 1 - mean
        cost = mean.new_tensor(self.config.ground_cost)
        return torch.einsum("ij,bjhw->bihw", cost, mean)

    def view_weights(self) -> Tensor:
        """w_t (B,N,h,w): validity, times exp(-entropy / h0) where asked for; sums to 1 over the views."""
        validity = self.seen.validity
        if self.config.view_entropy is not None:
            exponent = -entropy(self.seen.probabilities, 2) / self.config.view_entropy
            validity = validity * exponent.masked_fill(validity == 0, -torch.inf).softmax(1)
        return validity / validity.sum(1, keepdim=True).clamp_min(1e-8)

    def _transported(self, u: Tensor, views: Tensor, ground_cost: tuple[tuple[float, ...], ...]) -> Tensor:
        """Transport cost of (B,N,C,h,w) to (B,N,C,h,w) at every pixel, (B,N,h,w)."""
        shape = (*views.shape[:2], *views.shape[3:])
        one, other = (each.movedim(2, -1).reshape(-1, each.shape[2]) for each in (u, views))
        one, other = one / one.sum(1, keepdim=True), other / other.sum(1, keepdim=True)
        start = self.potentials.get("views")
        cost = views.new_tensor(ground_cost)
        found = transport(one, other, cost, epsilon=self.config.epsilon, iterations=TURNS, start=start)
        self.potentials["views"] = found.potentials.source
        return found.value.view(shape).to(u)


def smooth_distance(one: Tensor, other: Tensor, axis: int = 1) -> Tensor:
    """||one - other||_1 / 2 along an axis, smoothed."""
    return (((one - other).square() + SMOOTHING**2).sqrt() - SMOOTHING).sum(axis) / 2


def bounded_log(probabilities: Tensor) -> Tensor:
    """log(p + 1e-4) + log(p + 1e-30) / 100: the logarithm, but for classes that are all but ruled out."""
    return (probabilities + SMALLEST).log() + SLOPE * (probabilities + LEAST).log()


def entropy(probabilities: Tensor, axis: int = 1) -> Tensor:
    """- sum p log p along an axis, in nats."""
    return -(probabilities * probabilities.clamp_min(1e-12).log()).sum(axis)


def differences(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Forward differences of (B,C,h,w) down and to the right, 0 beyond the far border."""
    wide = F.pad(maps, (0, 1, 0, 1), mode="replicate")
    return wide[..., 1:, :-1] - maps, wide[..., :-1, 1:] - maps


def average(seen: Seen, kind: str) -> Tensor:
    """Mean of the views that see a pixel, (B,C,h,w): ``mean``, or ``log``, the geometric one."""
    weights = seen.validity / seen.validity.sum(1, keepdim=True).clamp_min(1e-8)
    if kind == "mean":
        mean = (weights[:, :, None] * seen.probabilities).sum(1)
        return mean / mean.sum(1, keepdim=True).clamp_min(1e-8)
    return (weights[:, :, None] * bounded_log(seen.probabilities)).sum(1).softmax(1)


def areas(u: Tensor, tissue: Tensor) -> Tensor:
    """Share of the tissue (B,h,w) whose likeliest class each is, (B,C), of maps u (B,C,h,w); alike without tissue."""
    likeliest = F.one_hot(u.argmax(1), u.shape[1]).movedim(-1, 1)
    total = (likeliest * tissue[:, None]).sum((2, 3))
    whole = total.sum(1, keepdim=True)
    return torch.where(whole > 0, total / whole.clamp_min(1e-8), 1 / u.shape[1])


def disagreement(seen: Seen, mean: Tensor) -> Tensor:
    """d(x) = mean over the views of ||p_t - mean||_1 / 2, (B,h,w) in [0,1]."""
    weights = seen.validity / seen.validity.sum(1, keepdim=True).clamp_min(1e-8)
    return (weights * (seen.probabilities - mean[:, None]).abs().sum(2) / 2).sum(1)


class FusionWeights(nn.Module):
    """What is learned of the fusion: the regulariser, the step size and lambda.

    Args:
        config: of the fusion.
        classes: C.
    """

    def __init__(self, config: FusionConfig, classes: int) -> None:
        super().__init__()
        regulariser = config.regulariser
        self.regulariser = TotalDeepVariation(
            classes,
            regulariser.features,
            regulariser.macro_blocks,
            regulariser.scales,
            3 if regulariser.guide == "image" else 0,
        )
        self.log_step = nn.Parameter(torch.tensor(config.step_size).log())
        self.log_fidelity = nn.Parameter(torch.tensor(config.fidelity_weight).log())
