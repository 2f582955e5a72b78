"""Matching losses of pictures that weight maps cut out of images, through a frozen encoder, in bounded memory.

Shared by pbip and lpd. The encoder sees two pictures of every pair of image and class (or prototype), so that its cost
rules the training step: pairs go through it in chunks, and each chunk is differentiated before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tissuehint.errors import InputError
from tissuehint.nn.matching import Form, Pairs, check_features, check_own, check_settings, losses_of
from tissuehint.nn.prototypes import precise_type

Encode = Callable[[Tensor], Tensor]

CHUNK = 32  # pairs at a time
STRETCH = 64.0  # largest gradient that enters an encoder in half precision


def masked_image_losses(
    foreground: Tensor | None,
    background: Tensor | None,
    images: Tensor,
    pairs: Pairs,
    prototypes: Tensor,
    encode: Encode,
    *,
    temperature: float = 1.0,
    form: Form = "class",
    counts: Sequence[int] | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor | None, Tensor | None]:
    """``matching_losses`` of the pictures that weight maps cut out of images, in bounded memory.

    The picture of pair p is weights[p] * images[pairs.images[p]] (Tang et al., PBIP, CVPR 2025, Eq. 5); where the
    weight is 0 stands 0, the mean colour of the encoder's normalisation.

    Gradients to weights and prototypes are taken chunk by chunk in the forward pass and kept for the backward pass, so
    that the encoder's activations of one chunk exist at a time: 2 ``chunk`` pictures, however many pairs there are.
    What grows with the pairs is their weights and the gradients of these, 4 h w numbers a pair. Every picture is
    encoded once and differentiated once, as without chunks.

    Args:
        foreground: (P,h,w) weights, or None to leave this loss out.
        background: (P,h,w) weights, or None to leave this loss out.
        images: (B,3,h,w), normalised for the encoder.
        pairs: which image and class each weight map belongs to.
        prototypes: (N,K,D).
        encode: pictures (b,3,h,w) to features (b,D), each from its picture alone; its weights are frozen.
        temperature: as ``matching_losses``.
        form: as ``matching_losses``.
        counts: as ``matching_losses``.
        chunk: pairs at a time.

    Returns:
        L_FG and L_BG, or None for what was left out; differentiable once.

    Raises:
        InputError: as ``matching_losses``; weights of another shape; a chunk below 1; in the prototype form, pairs
            without own prototype where the foreground is left out.
    """
    if foreground is None and background is None:
        return None, None
    if chunk < 1:
        raise InputError(f"chunk {chunk}", "is below 1", "give the number of pairs at a time")
    wanted = (len(pairs.classes), *images.shape[-2:])
    for name, each in (("foreground", foreground), ("background", background)):
        if each is not None and tuple(each.shape) != wanted:
            rule = f"is {tuple(each.shape)}; these pairs and images need {wanted}"
            raise InputError(name, rule, "give one weight map a pair, at the size of the images")
    check_settings(prototypes, temperature, form)
    check_own(prototypes, pairs.classes, pairs.own, counts)
    needs = tuple(
        torch.is_grad_enabled() and each is not None and each.requires_grad
        for each in (foreground, background, prototypes)
    )
    settings = _Settings(pairs, encode, temperature, form, None if counts is None else tuple(counts), chunk, needs)
    if form == "prototype" and pairs.own is None and foreground is None:
        raise InputError("pairs", "have no own prototype, which the background loss needs", "give pairs.own")
    given = [each if each is not None else images.new_zeros(0) for each in (foreground, background)]
    losses = _MaskedImages.apply(given[0], given[1], images, prototypes, settings)
    return (None if foreground is None else losses[0], None if background is None else losses[1])


class _Settings(NamedTuple):
    pairs: Pairs
    encode: Encode
    temperature: float
    form: Form
    counts: tuple[int, ...] | None
    chunk: int
    needs: tuple[bool, ...]  # gradients of foreground, background and prototypes


class _MaskedImages(torch.autograd.Function):
    """The two losses; the gradients of a chunk are taken as soon as it is encoded."""

    @staticmethod
    def forward(
        ctx: Any, foreground: Tensor, background: Tensor, images: Tensor, prototypes: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        weights = (foreground.detach(), background.detach())
        work = _Chunks(weights, images.detach(), prototypes.detach(), settings)
        for start in range(0, len(settings.pairs.classes), settings.chunk):
            work.add(slice(start, start + settings.chunk))
        ctx.save_for_backward(*work.of_weights, *work.of_prototypes)
        return work.total[0], work.total[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, front: Tensor, back: Tensor) -> tuple[Tensor | None, ...]:
        of_front, of_back, first, second = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            of_front * front if needs[0] else None,
            of_back * back if needs[1] else None,
            None,
            first * front + second * back if needs[3] else None,
            None,
        )


class _Chunks:
    """Losses and gradients, summed up over the chunks."""

    def __init__(
        self,
        weights: tuple[Tensor, Tensor],
        images: Tensor,
        prototypes: Tensor,
        settings: _Settings,
    ) -> None:
        self.weights, self.images, self.prototypes = weights, images, prototypes
        self.settings, self.needs = settings, settings.needs
        self.used = [bool(each.ndim == 3) for each in weights]
        precise = precise_type(prototypes)
        self.total = [images.new_zeros((), dtype=precise) for _ in range(2)]
        self.of_weights = [torch.zeros_like(each) for each in weights]
        self.of_prototypes = [torch.zeros_like(prototypes) for _ in range(2)]

    def add(self, rows: slice) -> None:
        """Encode and differentiate some pairs."""
        settings, pairs = self.settings, self.settings.pairs
        originals = self.images[pairs.images[rows]]
        parts = [number for number in range(2) if self.used[number]]
        pictures = torch.cat([self.weights[number][rows][:, None] * originals for number in parts])
        differentiate = self.needs[0] or self.needs[1]
        with torch.set_grad_enabled(any(self.needs)):
            features = settings.encode(pictures.requires_grad_() if differentiate else pictures)
        leaves, prototypes = features.detach(), self.prototypes.detach()
        if differentiate:
            leaves.requires_grad_()
        if self.needs[2]:
            prototypes.requires_grad_()
        with torch.set_grad_enabled(any(self.needs)):
            losses = self._losses(leaves, prototypes, rows, parts)
        slope = torch.zeros_like(leaves)
        for number in parts:
            self.total[number] += losses[number].detach()
            wanted = [each for each in (leaves, prototypes) if each.requires_grad]
            if not wanted:
                continue
            found = iter(torch.autograd.grad(losses[number], wanted, retain_graph=True, allow_unused=True))
            for leaf in wanted:
                gradient = next(found)
                if gradient is None:
                    continue
                if leaf is leaves:
                    slope += gradient
                else:
                    self.of_prototypes[number] += gradient
        if differentiate:
            # a share of the mean over many pairs is small, and would be 0 in the half precision of an encoder
            stretch = STRETCH / slope.abs().amax().clamp_min(1e-30) if _half(slope) else slope.new_ones(())
            (of_pictures,) = torch.autograd.grad(features, pictures, slope * stretch)
            for number, gradient in zip(parts, of_pictures.chunk(len(parts)), strict=True):
                self.of_weights[number][rows] = (gradient / stretch * originals).sum(1)

    def _losses(self, features: Tensor, prototypes: Tensor, rows: slice, parts: list[int]) -> dict[int, Tensor]:
        """The share of these pairs in the mean over all; what is left out is not computed from anything."""
        settings, pairs = self.settings, self.settings.pairs
        halves = features.chunk(len(parts))
        front, back = halves[0], halves[-1]
        own = None if pairs.own is None else pairs.own[rows]
        classes, temperature, form = pairs.classes[rows], settings.temperature, settings.form
        check_features(front, back, prototypes, classes, temperature, form)
        found = losses_of(front, back, prototypes, classes, temperature, form, own, settings.counts)
        share = len(front) / len(pairs.classes)
        return {number: found[number] * share for number in parts}


def _half(values: Tensor) -> bool:
    """Whether an encoder that gave these features computes in 16 bits of little range."""
    kind = values.device.type
    return values.dtype == torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    )
