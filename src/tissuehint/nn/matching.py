"""Foreground/background matching: what a class map shows of an image, and what it leaves, against prototypes.

Shared by pbip and lpd. ``nn.masked_images`` takes the pictures through the frozen encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tissuehint.errors import InputError
from tissuehint.nn.prototypes import check_counts, precise_type

Form = Literal["class", "prototype"]


class Pairs(NamedTuple):
    """Which map is matched in which image.

    Args:
        images: (P,) index of the image.
        classes: (P,) its class.
        own: (P,) prototype within the class, or None where the class is matched as a whole.
    """

    images: Tensor
    classes: Tensor
    own: Tensor | None


def matching_losses(
    foreground: Tensor,
    background: Tensor,
    prototypes: Tensor,
    classes: Tensor,
    *,
    temperature: float = 1.0,
    form: Form = "class",
    own: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Foregrounds should look like the prototypes of their class, backgrounds like those of the others.

    With cosines :math:`s(f, n, k)` of a feature f and prototype k of class n, and j the class of the pair,

    .. math::
        \text{class:}\quad L_{FG} &= -\log \frac{e^{a/\tau}}{e^{a/\tau} + e^{b/\tau}}, \quad
            a = \sum_k s(f, j, k), \quad b = \sum_{n \ne j} \sum_k s(f, n, k) \\
        L_{BG} &= -\log \frac{e^{b'/\tau}}{e^{a'/\tau} + e^{b'/\tau}}, \quad
            a' = \mathrm{mean}_k\, s(g, j, k), \quad b' = \mathrm{mean}_{n \ne j, k}\, s(g, n, k) \\
        \text{prototype:}\quad L_{FG} &= -\log \frac{e^{s(f, j, o)/\tau}}{\sum_{n,k} e^{s(f, n, k)/\tau}}, \qquad
        L_{BG} = -\log \frac{\sum_{(n,k) \ne (j,o)} e^{s(g, n, k)/\tau}}{\sum_{n,k} e^{s(g, n, k)/\tau}}

    for foreground f and background g, each the mean over the pairs. The class form is Tang et al., PBIP, CVPR 2025,
    Eq. 9-12. The prototype form contrasts one prototype o with all others, those of its own class included, as the
    released codes of PBIP and LPD do.

    Args:
        foreground: (M,D) of the frozen encoder, any length.
        background: (M,D).
        prototypes: (N,K,D) in the space of that encoder, any length.
        classes: (M,) int64 in 0..N-1.
        temperature: tau, above 0 (paper 1, released code .07).
        form: ``class`` or ``prototype``.
        own: (M,) int64 in 0..K-1, o of each pair; None takes the prototype of class j with the largest cosine to the
            foreground.
        counts: prototypes of each class where they differ; the rows of ``prototypes`` behind them are not read.

    Returns:
        L_FG and L_BG, scalars; 0 (with zero gradient) where there is no pair.

    Raises:
        InputError: fewer than two classes, other shapes, a temperature that is not above 0, an unknown form, a class or
            an own prototype that does not exist.

    Example:
        >>> prototypes = torch.eye(2)[:, None]  # two classes, one prototype each
        >>> foreground, background = matching_losses(
        ...     torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), prototypes, torch.tensor([0])
        ... )
        >>> round(float(foreground), 4), round(float(background), 4)  # log(1 + 1/e)
        (0.3133, 0.3133)
    """
    check_features(foreground, background, prototypes, classes, temperature, form)
    check_own(prototypes, classes, own, counts)
    return losses_of(foreground, background, prototypes, classes, temperature, form, own, counts)


def losses_of(
    foreground: Tensor,
    background: Tensor,
    prototypes: Tensor,
    classes: Tensor,
    temperature: float,
    form: Form,
    own: Tensor | None,
    counts: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """``matching_losses`` of what was checked."""
    present = _present(prototypes, counts)
    with torch.autocast(foreground.device.type, enabled=False):  # cosines over a small temperature need their digits
        filled = prototypes.to(precise_type(prototypes)).masked_fill(~present[0][..., None], 0)
        unit = F.normalize(filled, dim=2)
        front, back = _cosines(foreground, unit), _cosines(background, unit)
        if form == "class":
            return _class_form(front, back, classes, present, temperature)
        return _prototype_form(front, back, classes, present, temperature, own)


def adaptive_weights(maps: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    r"""Foreground and background weights of class maps.

    .. math::
        M(q) = \frac{\delta(m(q))}{\max_r \delta(m(r))}, \qquad b(q) = [M(q) \ge t], \qquad
        FG = b\,M, \qquad BG = (1 - b)(1 - M)

    with :math:`\delta` the ReLU. M is scaled to [0,1], so that 1 - M is a weight as Eq. 5 means it; b is then that of
    Eq. 4, :math:`m(q) \ge t \max m`, for each map by itself. A map without any part above 0 is background.

    Source: Tang et al., PBIP, CVPR 2025, Eq. 4 and 5.

    Args:
        maps: (P,h,w), one map a row.
        threshold: t in [0,1]; None weighs without b (FG = M, BG = 1 - M).

    Returns:
        (P,h,w) and (P,h,w), in [0,1], with gradient to the maps.

    Raises:
        InputError: a threshold outside of [0,1].

    Example:
        >>> front, back = adaptive_weights(torch.tensor([[[4.0, 2.0, 0.4, -3.0]]]), 0.15)
        >>> front.tolist(), [round(value, 2) for value in back.flatten().tolist()]
        ([[[1.0, 0.5, 0.0, 0.0]]], [0.0, 0.0, 0.9, 1.0])
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"threshold {threshold}", "is not in [0,1]", "use .15 (paper), .5 (released code), or None")
    active = F.relu(maps.to(precise_type(maps)))  # 1e-8 is 0 in half precision
    highest = active.amax((1, 2), keepdim=True)
    scaled = active / highest.clamp_min(1e-8)
    front, back = scaled, 1 - scaled
    if threshold is not None:
        chosen = ((scaled >= threshold) & (highest > 0)).to(scaled)
        front, back = chosen * front, (1 - chosen) * back
    return front.to(maps.dtype), back.to(maps.dtype)


def class_pairs(tags: Tensor) -> Pairs:
    """Every image with each class that it is tagged with.

    Args:
        tags: (B,N) in {0,1}.
    """
    images, classes = (tags > 0).nonzero(as_tuple=True)
    return Pairs(images, classes, None)


def prototype_pairs(tags: Tensor, scores: Tensor, counts: Sequence[int]) -> Pairs:
    """Every image with the prototypes of its tagged classes that score above the mean of their class.

    The best prototype of a tagged class is always among them, also where all score the same.

    Source: released codes of PBIP and LPD.

    Args:
        tags: (B,N) in {0,1}.
        scores: (B,L) of the prototypes, classes in order.
        counts: prototypes of each class.
    """
    check_counts(counts, scores.shape[1])
    present = _present(scores.new_zeros(len(counts), max(counts), 1), counts)
    # in double precision, where the mean of equal scores is not below them by rounding
    grouped = scores.new_full((len(scores), len(counts), max(counts)), float("-inf"), dtype=torch.float64)
    grouped[present.expand_as(grouped)] = scores.detach().double().flatten()
    mean = grouped.masked_fill(~present, 0).sum(2, keepdim=True) / present.sum(2, keepdim=True)
    highest = grouped.amax(2, keepdim=True)
    spread = (highest - mean) > 1e-9 * highest.abs()
    first = torch.arange(max(counts), device=scores.device) == grouped.argmax(2, keepdim=True)
    images, classes, own = ((((grouped > mean) & spread) | first) & (tags > 0)[..., None]).nonzero(as_tuple=True)
    return Pairs(images, classes, own)


def drawn_pairs(pairs: Pairs, most: int | None) -> Pairs:
    """At most ``most`` of the pairs, drawn at random (torch's global generator) and left in their order."""
    number = len(pairs.classes)
    if most is None or number <= most:
        return pairs
    kept = torch.randperm(number)[:most].sort().values.to(pairs.classes.device)
    return Pairs(pairs.images[kept], pairs.classes[kept], None if pairs.own is None else pairs.own[kept])


def _class_form(
    front: Tensor, back: Tensor, classes: Tensor, present: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    own = F.one_hot(classes, front.shape[1]).to(front)
    front, back = front * present, back * present
    number = present.sum(2).to(front)  # (1,N)
    of_front = front.sum(2)
    a, b = (of_front * own).sum(1), (of_front * (1 - own)).sum(1)
    of_back = back.sum(2)
    mean_own = (of_back * own).sum(1) / (number * own).sum(1)
    mean_others = (of_back * (1 - own)).sum(1) / (number * (1 - own)).sum(1)
    return _mean(F.softplus((b - a) / temperature)), _mean(F.softplus((mean_own - mean_others) / temperature))


def _prototype_form(
    front: Tensor, back: Tensor, classes: Tensor, present: Tensor, temperature: float, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    lowest = float("-inf")
    if own is None:
        rows = torch.arange(len(classes), device=classes.device)
        own = front.detach().masked_fill(~present, lowest)[rows, classes].argmax(1)
    place = (classes * front.shape[2] + own)[:, None]
    scores = (front / temperature).masked_fill(~present, lowest).flatten(1)
    loss = scores.logsumexp(1) - scores.gather(1, place)[:, 0]
    scores = (back / temperature).masked_fill(~present, lowest).flatten(1)
    # log of the sum over the others against the own one: no difference of two near equal sums
    others = scores.scatter(1, place, lowest).logsumexp(1)
    return _mean(loss), _mean(F.softplus(scores.gather(1, place)[:, 0] - others))


def _cosines(features: Tensor, unit: Tensor) -> Tensor:
    """(M,D) and unit (N,K,D) to (M,N,K)."""
    return torch.einsum("md,nkd->mnk", F.normalize(features.to(unit.dtype), dim=1), unit)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)


def _present(prototypes: Tensor, counts: Sequence[int] | None) -> Tensor:
    """(1,N,K) bool: which rows are prototypes."""
    classes, most = prototypes.shape[:2]
    if counts is None:
        return torch.ones(1, classes, most, dtype=torch.bool, device=prototypes.device)
    if len(counts) != classes or not all(1 <= count <= most for count in counts):
        rule = f"do not fit {classes} classes of up to {most} prototypes"
        raise InputError(f"counts {list(counts)}", rule, "give the number of prototypes of each class")
    number = torch.arange(most, device=prototypes.device)
    return (number < torch.tensor(counts, device=prototypes.device)[:, None])[None]


def check_features(
    foreground: Tensor, background: Tensor, prototypes: Tensor, classes: Tensor, temperature: float, form: str
) -> None:
    """Raise ``InputError`` unless settings are valid and shapes fit, as ``matching_losses`` says."""
    check_settings(prototypes, temperature, form)
    expected = (len(classes), prototypes.shape[2])
    for name, each in (("foreground", foreground), ("background", background)):
        if each.shape != expected:
            rule = f"is {tuple(each.shape)}; {len(classes)} pairs and these prototypes need {expected}"
            raise InputError(name, rule, "give one feature a pair, of the encoder that made the prototypes")


def check_settings(prototypes: Tensor, temperature: float, form: str) -> None:
    """Raise ``InputError`` for an unknown form, a temperature that is not above 0, or fewer than two classes."""
    if form not in ("class", "prototype"):
        raise InputError(f"form '{form}'", "is neither class nor prototype", "use one of these")
    if not temperature > 0:
        raise InputError(f"temperature {temperature}", "is not above 0", "use 1 (paper) or .07 (released code)")
    if prototypes.ndim != 3 or len(prototypes) < 2:
        rule = "are not (N, K, D) of at least two classes, without which there is nothing to contrast with"
        raise InputError(f"prototypes of shape {tuple(prototypes.shape)}", rule, "give the prototypes of all classes")


def check_own(prototypes: Tensor, classes: Tensor, own: Tensor | None, counts: Sequence[int] | None) -> None:
    """Raise ``InputError`` for classes that do not exist, or own prototypes that their classes do not have."""
    number, most = prototypes.shape[:2]
    if not len(classes):
        return
    if not 0 <= int(classes.min()) <= int(classes.max()) < number:
        rule = (
            f"hold {int(classes.min())} to {int(classes.max())}; {number} classes of prototypes are 0 to {number - 1}"
        )
        raise InputError("classes", rule, "give the index of the class of each pair")
    if own is None:
        return
    if own.shape != classes.shape:
        rule = f"is {tuple(own.shape)}; {len(classes)} pairs need {tuple(classes.shape)}"
        raise InputError("own", rule, "give one prototype a pair")
    limit = torch.full_like(classes, most) if counts is None else torch.tensor(counts, device=classes.device)[classes]
    wrong = ((own < 0) | (own >= limit)).nonzero()
    if len(wrong):
        pair = int(wrong[0])
        rule = f"is {int(own[pair])} for pair {pair}, whose class has {int(limit[pair])} prototypes, counted from 0"
        raise InputError("own", rule, "give the index of a prototype within its class")
