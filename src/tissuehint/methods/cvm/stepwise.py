"""Terms of the compared methods that are computed anew in each step: regularisation, teachers, second branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta

from tissuehint.methods.cvm import comparators
from tissuehint.methods.cvm.losses import partial_cross_entropy
from tissuehint.methods.cvm.model import CVMNetwork
from tissuehint.nn.networks import Dense

# of the regularised loss, scaled as ``comparators.crf_loss`` says: Tang et al. have 1.5e-9 on sums, about .14 here
CRF_WEIGHT = 0.1
# the noise of the teacher's input is cut at this value (Yu et al., MICCAI 2019)
NOISE_LIMIT = 0.2
# largest weight of the consistency of mixed images; ours, ramped up
MIX_WEIGHT = 1.0


class Step(NamedTuple):
    """What a term may look at.

    Args:
        network: with its teacher or second decoder.
        images: (B,3,H,W) in [0,1].
        points: B tensors (P_b,3) on the working grid.
        radius: of points.
        progress: share of training that is done, in [0,1].
    """

    network: CVMNetwork
    images: Tensor
    points: list[Tensor]
    radius: int
    progress: float


Terms = dict[str, Tensor]


def crf(step: Step) -> tuple[Dense, Terms]:
    """Regularised loss of Tang et al., ECCV 2018: dense CRF energy of the output."""
    dense = step.network.dense(step.images)
    size = (dense.logits.shape[-2], dense.logits.shape[-1])
    images = torch.nn.functional.interpolate(step.images, size, mode="area")
    return dense, {"crf": CRF_WEIGHT * comparators.crf_loss(dense.logits.softmax(1), images)}


def mean_teacher(step: Step) -> tuple[Dense, Terms]:
    """Agreement with a slow copy where that copy is sure (Yu et al. 2019; Liu et al. 2022)."""
    dense = step.network.dense(step.images)
    teacher = step.network.teacher
    assert teacher is not None
    with torch.no_grad():
        noisy = [step.images + _noise(step.images) for _ in range(comparators.TEACHER_PASSES)]
        passes = torch.stack([teacher.dense(images).logits for images in noisy])
    threshold = comparators.entropy_threshold(step.progress, dense.logits.shape[1])
    loss = comparators.uncertain_consistency_loss(dense.logits, passes, threshold)
    return dense, {"consistency": comparators.CONSISTENCY_WEIGHT * comparators.ramp_up(step.progress) * loss}


def dual_branch(step: Step) -> tuple[Dense, Terms]:
    """Two decoders that teach each other by a random mixture of their outputs (Luo et al. 2022).

    The partial cross-entropy of the main decoder is counted by the caller with weight 1; that of the second one is
    added here, so that both count alike.
    """
    dense, auxiliary = step.network.both(step.images)
    alpha = float(torch.rand(()))
    pseudo = comparators.mixed_pseudo_label_loss(dense.logits, auxiliary, alpha)
    points = partial_cross_entropy(auxiliary.log_softmax(1), step.points, step.radius)
    return dense, {"auxiliary": points, "pseudo_labels": comparators.PSEUDO_LABEL_WEIGHT * pseudo}


def mixmatch(step: Step) -> tuple[Dense, Terms]:
    """Sharpened agreement of two views, followed on mixed images (Berthelot et al. 2019; Gao et al. 2020)."""
    dense = step.network.dense(step.images)
    with torch.no_grad():
        mirrored = step.network.dense(step.images.flip(-1)).logits.flip(-1)
        guess = comparators.guess_labels(torch.stack([dense.logits.detach(), mirrored]))
    share = float(Beta(comparators.MIXUP_BETA, comparators.MIXUP_BETA).sample())
    order = torch.randperm(len(step.images), device=step.images.device)
    images, targets = comparators.mixup(step.images, guess, share, order)
    loss = comparators.consistency_loss(step.network.dense(images).logits, targets)
    return dense, {"consistency": MIX_WEIGHT * comparators.ramp_up(step.progress) * loss}


STEPWISE: dict[str, Callable[[Step], tuple[Dense, Terms]]] = {
    "crf": crf,
    "mean_teacher": mean_teacher,
    "dual_branch": dual_branch,
    "mixmatch": mixmatch,
}


def _noise(images: Tensor) -> Tensor:
    return (torch.randn_like(images) * comparators.TEACHER_NOISE).clamp(-NOISE_LIMIT, NOISE_LIMIT)
