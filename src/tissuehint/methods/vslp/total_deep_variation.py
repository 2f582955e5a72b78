r"""Total Deep Variation: a small network that says at every pixel how unlikely the tissue map around it is.

R(u) = sum_x r(u)(x),   r(u) = w' N(K u)

(Kobler, Effland, Kunisch and Pock, Total Deep Variation for Linear Inverse Problems, CVPR 2020, Section 3). K are 3 x 3
filters of zero mean in every channel, so that R is blind to a class that is shifted by a constant everywhere: structure
is regularised, and areas are not. N is a chain of macro-blocks, U-Nets of several scales made of micro-blocks
x + A2 phi(A1 x) with phi(s) = log(1 + s^2) / 2; there are no biases, so that a constant map has energy 0. Borders are
mirrored.

Ours: the filters K can also see a guide (the image), through which r knows where edges are; only u is differentiated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError

#: Binomial blur before and after a change of scale: 5 taps are twice these 3.
BLUR = (0.25, 0.5, 0.25)


class TotalDeepVariation(nn.Module):
    """Learned regulariser of tissue maps.

    Args:
        channels: K, classes of the maps.
        features: m, channels inside (Kobler et al.: 32).
        macro_blocks: U-Nets in a chain (3).
        scales: of each U-Net, every one half as fine as the one before (3).
        guide_channels: channels of the guide; 0 for none.

    Raises:
        InputError: a number below 1 (``guide_channels``: below 0).
    """

    def __init__(
        self, channels: int, features: int = 32, macro_blocks: int = 3, scales: int = 3, guide_channels: int = 0
    ) -> None:
        super().__init__()
        for name, value in (
            ("channels", channels),
            ("features", features),
            ("macro_blocks", macro_blocks),
            ("scales", scales),
            ("guide_channels", guide_channels),
        ):
            least = 0 if name == "guide_channels" else 1
            if value < least:
                raise InputError(f"{name} {value}", f"is below {least}", f"use at least {least}")
        self.channels, self.guide_channels, self.scales = channels, guide_channels, scales
        self.filters = nn.Parameter(_normal(features, channels, 3))
        self.guide_filters = nn.Parameter(_normal(features, guide_channels, 3)) if guide_channels else None
        self.blocks = nn.ModuleList(MacroBlock(features, scales) for _ in range(macro_blocks))
        self.weight = nn.Parameter(_normal(1, features, 1))

    def energy(self, u: Tensor, guide: Tensor | None = None) -> Tensor:
        """The energy r at every pixel.

        Args:
            u: (B,K,H,W), any size from 1 px.
            guide: (B,G,H,W), where the network has guide channels.

        Returns:
            (B,H,W); 0 for a map that is constant in every channel, where there is no guide.

        Raises:
            InputError: another number of channels, a guide that is missing or not expected.
        """
        self._check(u, guide)
        first = F.conv2d(_mirrored(u), self.zero_mean_filters())
        if guide is not None and self.guide_filters is not None:
            first = first + F.conv2d(_mirrored(guide), _bounded(self.guide_filters))
        states: list[Tensor | None] = [first] + [None] * (self.scales - 1)
        for block in self.blocks:
            states = block(states)
        finest = states[0]
        assert finest is not None
        return F.conv2d(finest, self.weight)[:, 0]

    def gradient(self, u: Tensor, guide: Tensor | None = None) -> Tensor:
        """Derivative of R(u) = sum over pixels of ``energy``, (B,K,H,W); differentiable where gradients are on."""
        keep = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            at = u if keep and u.requires_grad else u.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.energy(at, guide).sum(), at, create_graph=keep)
        return gradient

    def zero_mean_filters(self) -> Tensor:
        """K (m,channels,3,3): each channel of a filter sums to 0, and its norm is at most 1."""
        return _bounded(self.filters - self.filters.mean((2, 3), keepdim=True))

    def _check(self, u: Tensor, guide: Tensor | None) -> None:
        if u.ndim != 4 or u.shape[1] != self.channels:
            raise InputError(f"map of shape {tuple(u.shape)}", f"is (B,{self.channels},H,W)", "give one map a class")
        expected = (len(u), self.guide_channels, *u.shape[2:])
        if (guide is None) != (self.guide_channels == 0) or (guide is not None and guide.shape != expected):
            subject = "guide" if guide is None else f"guide of shape {tuple(guide.shape)}"
            rule = f"is {expected} for this network" if self.guide_channels else "is not known to this network"
            raise InputError(subject, rule, "give what guide_channels says")


class MacroBlock(nn.Module):
    """A U-Net without norms: two micro-blocks a scale, one at the coarsest; scales of the block before are added."""

    def __init__(self, features: int, scales: int) -> None:
        super().__init__()
        self.before = nn.ModuleList(MicroBlock(features) for _ in range(scales))
        self.after = nn.ModuleList(MicroBlock(features) for _ in range(scales - 1))
        self.down = nn.ParameterList(nn.Parameter(_normal(features, features, 3)) for _ in range(scales - 1))
        self.up = nn.ParameterList(nn.Parameter(_normal(features, features, 3)) for _ in range(scales - 1))

    def forward(self, states: list[Tensor | None]) -> list[Tensor | None]:
        """Maps by scale, fine to coarse; those that no block before has made are None."""
        seen: list[Tensor] = []
        for scale, block in enumerate(self.before):
            state = states[scale]
            if scale > 0:
                coarser = F.conv2d(_mirrored(_blurred(seen[-1])), self.down[scale - 1], stride=2)
                state = coarser if state is None else state + coarser
            assert state is not None
            seen.append(block(state))
        for scale in range(len(self.after) - 1, -1, -1):
            finer = _enlarged(seen[scale + 1], self.up[scale], seen[scale])
            seen[scale] = self.after[scale](seen[scale] + finer)
        return list(seen)


class MicroBlock(nn.Module):
    """x + A2 phi(A1 x)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(_normal(features, features, 3))
        self.outer = nn.Parameter(_normal(features, features, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(B,m,H,W) to the same."""
        inner = F.conv2d(_mirrored(x), self.inner)
        return x + F.conv2d(_mirrored(torch.log1p(inner.square()) / 2), self.outer)


def _enlarged(coarse: Tensor, kernel: Tensor, like: Tensor) -> Tensor:
    """Transposed convolution of stride 2 to the size of ``like``, and the blur."""
    height, width = like.shape[2:]
    # one cell more on each side, so that the border is made from mirrored cells too
    fine = F.conv_transpose2d(_mirrored(coarse), kernel, stride=2, padding=1)
    return _blurred(fine[..., 2 : height + 2, 2 : width + 2])


def _blurred(x: Tensor) -> Tensor:
    """The 5 x 5 binomial filter, (1 4 6 4 1) / 16 along each axis, as four passes of three taps."""
    side, middle, _ = BLUR
    for _ in range(2):
        wide = F.pad(x, (1, 1, 1, 1), mode="replicate")
        rows = side * (wide[..., :-2, :] + wide[..., 2:, :]) + middle * wide[..., 1:-1, :]
        x = side * (rows[..., :-2] + rows[..., 2:]) + middle * rows[..., 1:-1]
    return x


def _mirrored(x: Tensor) -> Tensor:
    """One pixel more on each side; mirroring with the border pixel repeated is the same as repeating it."""
    return F.pad(x, (1, 1, 1, 1), mode="replicate")


def _bounded(filters: Tensor) -> Tensor:
    """Filters of norm at most 1."""
    norm = filters.flatten(1).square().sum(1).clamp_min(1e-24).sqrt()
    bounded: Tensor = filters / norm.clamp_min(1)[:, None, None, None]
    return bounded


def _normal(out: int, channels: int, side: int) -> Tensor:
    return torch.randn(out, channels, side, side) / math.sqrt(max(channels, 1)) / side
