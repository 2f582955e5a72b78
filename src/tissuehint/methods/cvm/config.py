"""Settings of CVM and of the methods its paper compares with."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tissuehint.methods.base import WhiteConfig
from tissuehint.methods.cvm.contrast import ETA
from tissuehint.nn.config import NetworkConfig
from tissuehint.nn.optimization import Optimization

Complement = Literal[
    "variational",
    "contrast_map",
    "direct_variational",
    "similarity",
    "crf",
    "mean_teacher",
    "dual_branch",
    "mixmatch",
    "none",
]
# what is made once a round for every training item and stored; the others are terms of each step
STORED: tuple[str, ...] = ("variational", "contrast_map", "direct_variational", "similarity")


class CVMConfig(WhiteConfig):
    """A segmentation network trained on points and on a segmentation that the points and its own features give.

    Args:
        network: any network; ``scale`` and ``trunk`` set the working grid (paper, Section 4.1: a ResNet-34 trunk of
            stride 16 for 4096-px crops).
        target: with two tissue classes, the name of the in-target one; None takes the last. More than two classes are
            each segmented against the rest, and ``target`` stays None.
        sides: with two tissue classes, segment the ``target`` alone (the paper), or ``both`` classes, each against the
            other, as more than two are: a pixel that is like neither is then uncertain instead of out of the target.
        complement: what supervises the pixels without point. ``variational`` is the paper's method; the other names are
            the rows of its Table 1: ``none`` (partial cross-entropy alone), ``contrast_map``, ``direct_variational``
            (the network's own output instead of a contrast map), ``similarity`` (Peng et al.), ``crf``,
            ``mean_teacher``, ``dual_branch``, ``mixmatch``.
        consistency: how the network follows the stored segmentation u: ``weighted_kl`` (Eq. 2), or ``cross_entropy``
            with u cut at .5 (paper, Fig. 3a, without weighted KL).
        complement_weight: factor of that term; the paper has none.
        eta: weight of the out-of-target correlation in the contrast maps (Eq. 5).
        data_weight: lambda of Eq. 6; the paper does not give its value.
        edge_factor: of the edge detector g = 1 / (1 + factor |grad z|^2).
        edge_sigma: of the Gaussian on z before its gradient, in pixels of the working grid.
        solver: of Eq. 6; ``primal_dual`` is exact for fixed means, ``aos`` is the paper's scheme.
        point_radius: a point labels the square of side 2 radius + 1 around it, in pixels of the working grid
            (paper, Section 5.2: 3 x 3 on the tissue cores).
        keep: weights at the end: of the round with the ``lowest`` partial cross-entropy on validation points (the
            paper), or the ``last``. Without validation images it is always the last.
        optimization: optimiser, learning rates, schedule.
    """

    name: Literal["cvm"] = "cvm"
    network: NetworkConfig = NetworkConfig()
    target: str | None = None
    sides: Literal["target", "both"] = "target"
    complement: Complement = "variational"
    consistency: Literal["weighted_kl", "cross_entropy"] = "weighted_kl"
    complement_weight: float = Field(default=1.0, ge=0)
    eta: float = Field(default=ETA, ge=0, le=1)
    data_weight: float = Field(default=3.0, gt=0)
    edge_factor: float = Field(default=10.0, ge=0)
    edge_sigma: float = Field(default=1.0, ge=0)
    solver: Literal["primal_dual", "aos"] = "primal_dual"
    point_radius: int = Field(default=1, ge=0)
    keep: Literal["lowest", "last"] = "lowest"
    optimization: Optimization = Optimization()
