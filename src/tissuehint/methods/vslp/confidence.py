"""Stage 1 of VSLP: class distributions of the cells of an image, and the proportions that they add up to."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.methods.vslp.config import ConfidenceConfig, ProportionLosses, TileConfig
from tissuehint.nn.class_maps import ClassMapNetwork, ClassMapSettings
from tissuehint.nn.networks import build_network

#: Windows of tiles that go through the encoder at a time.
WINDOWS = 64

#: Power of the generalised mean that says whether a class is somewhere; the maximum is its limit.
POOLING_POWER = 8.0

SMALLEST = 1e-6


class Cells(NamedTuple):
    """What is said of the cells of images.

    Args:
        logits: (B,C,n,m).
        covered: px (rows, columns) that the cells cover together, at least those of the image.
    """

    logits: Tensor
    covered: tuple[int, int]


class Confidence(nn.Module):
    """Class logits of tokens, tiles or pixels.

    Args:
        config: which cells, which network.
        classes: C, number of tissue classes.
    """

    def __init__(self, config: ConfidenceConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.network: nn.Module
        if config.network is not None:
            self.network = build_network(config.network, classes)
        else:
            settings = ClassMapSettings(
                encoder=config.encoder, levels=config.levels, dropout=config.dropout, centred=config.centred
            )
            self.network = ClassMapNetwork(settings, classes)

    @property
    def encoder(self) -> nn.Module:
        """The part that pretrained weights are for."""
        encoder = self.network.encoder
        assert isinstance(encoder, nn.Module)
        return encoder

    def forward(self, images: Tensor) -> Cells:
        """Images (B,3,H,W) in [0,1] to the logits of their cells.

        Raises:
            InputError: a side under 32 px, but for tiles, which bring their own surroundings.
        """
        size = (images.shape[-2], images.shape[-1])
        if self.config.cells == "tiles":
            return self._tiles(images, self.config.tiles)
        found = self.network(images)
        return Cells(found if isinstance(found, Tensor) else found.maps, size)

    def _tiles(self, images: Tensor, config: TileConfig) -> Cells:
        """Every tile in the middle of its own window; white where the image ends."""
        batch, _, height, width = images.shape
        rows, columns = -(-height // config.stride), -(-width // config.stride)
        covered = (rows * config.stride, columns * config.stride)
        before = (config.side - config.stride) // 2
        behind = config.side - config.stride - before
        border = (before, covered[1] - width + behind, before, covered[0] - height + behind)
        wide = F.pad(images, border, value=1.0)
        windows = wide.unfold(2, config.side, config.stride).unfold(3, config.side, config.stride)
        windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        found = torch.cat([self.network(part).logits for part in torch.split(windows, WINDOWS)])
        return Cells(found.view(batch, rows, columns, -1).permute(0, 3, 1, 2), covered)

    def drawn(self, images: Tensor, tissue: Tensor) -> tuple[Tensor, Tensor]:
        """What a training step sees: logits (B,C,n) of cells and their weights (B,n), summing to 1 where there is any.

        Args:
            images: (B,3,H,W).
            tissue: (B,H,W), 1 on tissue.
        """
        tiles = self.config.tiles
        if self.training and self.config.cells == "tiles" and tiles.in_training is not None:
            return self._drawn_tiles(images, tissue, tiles, tiles.in_training)
        cells = self(images)
        return cells.logits.flatten(2), cell_weights(tissue, cells).flatten(1)

    def _drawn_tiles(self, images: Tensor, tissue: Tensor, tiles: TileConfig, count: int) -> tuple[Tensor, Tensor]:
        """As many tiles as are asked for, the same places in each image of the batch."""
        height, width = images.shape[-2:]
        rows, columns = -(-height // tiles.stride), -(-width // tiles.stride)
        before = (tiles.side - tiles.stride) // 2
        behind = tiles.side - before
        border = (before, columns * tiles.stride - width + behind, before, rows * tiles.stride - height + behind)
        wide = F.pad(images, border, value=1.0)
        mask = F.pad(tissue, (0, columns * tiles.stride - width, 0, rows * tiles.stride - height))
        logits, weights = [], []
        for place in torch.randperm(rows * columns)[:count].tolist():
            top, left = (tiles.stride * index for index in divmod(place, columns))
            logits.append(self.network(wide[..., top : top + tiles.side, left : left + tiles.side]).logits)
            weights.append(mask[:, top : top + tiles.stride, left : left + tiles.stride].mean((1, 2)))
        return torch.stack(logits, 2), even(torch.stack(weights, 1))


def cell_weights(tissue: Tensor, cells: Cells) -> Tensor:
    """Share of the tissue of an image in each of its cells, (B,n,m) summing to 1; even where there is no tissue.

    Args:
        tissue: (B,H,W), 1 on tissue.
        cells: of the same images.
    """
    height, width = tissue.shape[-2:]
    whole = F.pad(tissue, (0, cells.covered[1] - width, 0, cells.covered[0] - height))
    # the mean over a cell; cells that do not divide the image take the pixels that they touch
    rows, columns = cells.logits.shape[-2:]
    parts = F.adaptive_avg_pool2d(whole[:, None], (rows, columns))[:, 0]
    return even(parts.flatten(1)).view_as(parts)


def even(weights: Tensor) -> Tensor:
    """Rows (B,n) scaled to sum 1; a row of zeros becomes uniform."""
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-12), 1 / weights.shape[1])


def proportion_losses(
    logits: Tensor, weights: Tensor, proportions: Tensor, config: ProportionLosses
) -> dict[str, Tensor]:
    r"""Terms of stage 1, each weighted, means over images.

    With the distribution p of cell k and its share lambda_k of the tissue, pi_hat = sum_k lambda_k p_k (PropSegNet).
    ``proportions``: - sum_c pi_c log pi_hat_c, or another distance; ``entropy``: sum_k lambda_k H(p_k); ``presence``:
    binary cross-entropy of s_c = (sum_k lambda_k p_kc^8)^(1/8) towards 0 where pi_c = 0 and 1 where it is above
    ``presence_above``.

    Args:
        logits: (B,C,n) of cells.
        weights: (B,n), summing to 1.
        proportions: (B,C), summing to 1.
        config: forms and weights.
    """
    log_probabilities = logits.float().log_softmax(1)
    probabilities = log_probabilities.exp()
    log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()[:, None]
    if config.form == "cross_entropy":  # in the logarithm, so that a class that is seen nowhere can still be learned
        distance = -(proportions * (log_probabilities + log_weights).logsumexp(2)).sum(1)
    else:
        predicted = (probabilities * weights[:, None]).sum(2)
        distance = proportion_distance(predicted, proportions, config.form, config.dead_zone)
    terms = {"proportions": distance.mean()}
    if config.entropy_weight:
        entropy = -(probabilities * log_probabilities).sum(1)
        terms["entropy"] = config.entropy_weight * (entropy * weights).sum(1).mean()
    if config.presence_weight:
        somewhere = (POOLING_POWER * log_probabilities + log_weights).logsumexp(2) / POOLING_POWER
        present, absent = proportions > config.presence_above, proportions <= 0
        surprise = -torch.where(present, somewhere, (1 - somewhere.exp().clamp_max(1 - SMALLEST)).log())
        asked = (present | absent).to(surprise)
        terms["presence"] = config.presence_weight * ((surprise * asked).sum(1) / asked.sum(1).clamp_min(1)).mean()
    return terms


def proportion_distance(predicted: Tensor, given: Tensor, form: str, dead_zone: float = 0.0) -> Tensor:
    """Distance of proportions (B,C), per image (B,).

    Args:
        predicted: at least 0, summing to 1.
        given: likewise.
        form: ``cross_entropy``, ``l1``, ``l2`` or ``wasserstein``.
        dead_zone: taken off each difference, down to 0; not for ``cross_entropy``.
    """
    if form == "cross_entropy":
        return -(given * predicted.clamp_min(SMALLEST).log()).sum(1)
    beyond = ((predicted - given).abs() - dead_zone).clamp_min(0)
    if form == "l2":
        return beyond.square().sum(1)
    return beyond.sum(1) / (2 if form == "wasserstein" else 1)


def best_temperature(logits: list[Tensor], weights: list[Tensor], proportions: list[Tensor]) -> float:
    """The temperature in [1/4, 4] at which mean probabilities are nearest to the proportions (in cross-entropy).

    Args:
        logits: (C,n) of each image.
        weights: (n,) of each image.
        proportions: (C,) of each image.
    """
    from scipy.optimize import minimize_scalar

    def surprise(exponent: float) -> float:
        total = 0.0
        for each, weight, given in zip(logits, weights, proportions, strict=True):
            mean = ((each.double() / math.exp(exponent)).softmax(0) * weight.double()).sum(1)
            total -= float((given.double() * mean.clamp_min(SMALLEST).log()).sum())
        return total

    found = minimize_scalar(surprise, bounds=(-math.log(4), math.log(4)), method="bounded", options={"xatol": 1e-4})
    return math.exp(float(found.x))
