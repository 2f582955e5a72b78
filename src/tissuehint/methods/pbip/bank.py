"""The image bank: training patches of one tissue each, clustered, and the prototypes that their features give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from tissuehint.data.training_sets import HintSet
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.methods.pbip.features import Features, bank_features, item_name
from tissuehint.nn.image_encoders import ImageEncoder
from tissuehint.ops.clustering import RESTARTS, spherical_kmeans

PROTOTYPES = 3  # Tang et al. 2025, Implementation Details: K
IMAGES = 100  # N_K
KEY = "method.bank"


class BankConfig(BaseModel):
    """How the bank is made.

    Args:
        prototypes_per_class: K, one number for all classes or one for each, in their order.
        images_per_prototype: N_K, images of each sub-class whose features make its prototype.
        selection: which images of a cluster: the ``nearest`` to its centre, ``random`` ones, or ``all`` (PBIP, Fig. 4).
        max_white: a patch with a larger share of white is no candidate. The paper leaves out "excessive white"
            without a number.
        white_threshold: grey value in 0..255 above which a pixel is white.
        multi_tag_fallback: where a class has fewer than K patches that carry its tag alone, take its purest others
            (``purest``) instead of stopping.
        center: compare what is left of the unit features when the mean over all single-tag candidates is taken away.
            Features of encoders that were not trained on tissue lie in a narrow cone, where every cosine is near 1.
        restarts: of the clustering.
        seed: of the clustering and of ``random``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prototypes_per_class: int | tuple[int, ...] = PROTOTYPES
    images_per_prototype: int = Field(default=IMAGES, ge=1)
    selection: Literal["nearest", "random", "all"] = "nearest"
    max_white: float = Field(default=0.3, ge=0, le=1)
    white_threshold: int = Field(default=200, ge=0, le=255)
    multi_tag_fallback: bool = False
    center: bool = False
    restarts: int = Field(default=RESTARTS, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("prototypes_per_class")
    @classmethod
    def _at_least_one(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        numbers = (value,) if isinstance(value, int) else value
        if not numbers or min(numbers) < 1:
            raise ValueError(f"{value} is not at least one prototype a class")
        return value

    def counts(self, labels: LabelSpace) -> tuple[int, ...]:
        """K of each tissue class.

        Raises:
            InputError: a list that does not have one number for each class.
        """
        given = self.prototypes_per_class
        if isinstance(given, int):
            return (given,) * labels.num_tissue
        if len(given) != labels.num_tissue:
            rule = f"has {len(given)} numbers, the data set {labels.num_tissue} tissue classes"
            fix = f"give one for each of {', '.join(labels.names[: labels.num_tissue])}, or a single number"
            raise InputError(f"recipe key {KEY}.prototypes_per_class = {list(given)}", rule, fix)
        return given


@dataclass(frozen=True)
class SubClass:
    """One prototype and what it is made of.

    Args:
        tissue: name of the class.
        number: of the sub-class, from 1; the largest first.
        members: patches in its cluster.
        images: ids of the N_K patches that make the prototype, the nearest to the centre first.
        items: their places in the set of training patches.
        similarity: cosine of each to the centre.
    """

    tissue: str
    number: int
    members: int
    images: tuple[str, ...]
    items: tuple[int, ...]
    similarity: tuple[float, ...]


@dataclass(frozen=True)
class Bank:
    """The image bank.

    Args:
        prototypes: (L,D) unit vectors, classes in order.
        counts: prototypes of each class; their sum is L.
        center: (D,) what is taken away from unit features before they are compared; 0 without ``BankConfig.center``.
        sub_classes: L descriptions.
        candidates: patches of each class that were clustered.
        notes: what a reader of the results must know.
    """

    prototypes: Tensor
    counts: tuple[int, ...]
    center: Tensor
    sub_classes: tuple[SubClass, ...]
    candidates: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vectors, for JSON."""
        return {
            "counts": list(self.counts),
            "candidates": list(self.candidates),
            "notes": list(self.notes),
            "sub_classes": [asdict(each) for each in self.sub_classes],
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any], prototypes: Tensor, center: Tensor) -> Bank:
        """Inverse of ``to_dict``."""
        lists = ("images", "items", "similarity")
        parts: list[dict[str, Any]] = [
            {key: tuple(value) if key in lists else value for key, value in each.items()}
            for each in found["sub_classes"]
        ]
        return cls(
            prototypes,
            tuple(found["counts"]),
            center,
            tuple(SubClass(**each) for each in parts),
            tuple(found["candidates"]),
            tuple(found["notes"]),
        )


def build_bank(
    items: HintSet, labels: LabelSpace, config: BankConfig, encoder: ImageEncoder, device: torch.device | str = "cpu"
) -> Bank:
    r"""Cluster the patches of each class and take a prototype from every cluster.

    1. Candidates of class n: patches whose only tag is n and whose white share is at most ``max_white``.
    2. Features x/||x|| of the frozen encoder (with ``center`` less the mean of all candidates), clustered by the cosine
       distance of Eq. 1 (``ops.clustering``).
    3. Of each cluster the N_K images nearest to its centre; the prototype is the mean of their unit features, scaled
       to length 1 (only its direction is ever used).

    Masks are not read. The order of the patches does not matter: candidates are sorted by id first.

    Source: Tang et al., PBIP, CVPR 2025, Section 3.2 and 3.4.

    Args:
        items: training patches with tags.
        labels: the classes.
        config: K, N_K, white filter, fallback.
        encoder: the frozen encoder, on ``device``.
        device: where features are computed and clustered.

    Raises:
        InputError: a class with fewer candidates than prototypes (and no fallback that helps).
    """
    counts = config.counts(labels)
    tags = need_tags(items)
    single = single_tags(tags)
    found = bank_features(items, np.flatnonzero(single >= 0), encoder, config, device)
    found = found.where(found.white <= config.max_white)
    center = found.features.mean(0) if config.center and len(found.items) else torch.zeros(encoder.dim, device=device)
    groups, notes = [], []
    for number, name in enumerate(labels.names[: labels.num_tissue]):
        own = found.where(single[found.items] == number)
        if len(own.items) < counts[number]:
            own = _fallback(items, tags, number, name, own, found, single, config, counts[number], encoder, device)
            notes.append(f"Prototypes of {name} come from patches that also carry other tags (multi_tag_fallback).")
        groups.append(own.sorted(items).centred(center))
    prototypes, sub_classes = [], []
    for number, own in enumerate(groups):
        made, parts = _sub_classes(own, items, labels.names[number], counts[number], config)
        prototypes.append(made)
        sub_classes += parts
    sizes = tuple(len(own.items) for own in groups)
    vectors, moved = torch.cat(prototypes).cpu().float(), center.cpu().float()
    return Bank(vectors, counts, moved, tuple(sub_classes), sizes, tuple(notes))


def need_tags(items: HintSet) -> NDArray[np.uint8]:
    """(M,N) tags of the patches.

    Raises:
        InputError: there are none.
    """
    if items.tags is None:
        raise InputError("training set", "has no tags", "give tags, or use another method")
    return items.tags


def single_tags(tags: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class of each patch that carries one tag alone, -1 for all others.

    Example:
        >>> single_tags(np.array([[0, 1, 0], [1, 1, 0], [0, 0, 0]], np.uint8)).tolist()
        [1, -1, -1]
    """
    return np.where((tags > 0).sum(1) == 1, tags.argmax(1), -1)


def purest(features: Tensor, others: Sequence[Tensor], tags: NDArray[np.uint8], class_number: int) -> NDArray[np.int64]:
    """Patches that carry a tag among others, the purest first.

    Tags say nothing about shares, so a patch counts as pure where it carries few tags; among equals, where it looks
    least like the other tissues that it is tagged with: by the smallest of the largest cosines to their mean features.

    Args:
        features: (M,D) unit features of the patches.
        others: for each class the (D,) mean feature of its single-tag patches, or an empty tensor where it has none.
        tags: (M,N) of the patches.
        class_number: the class that all of them carry.

    Returns:
        (M,) their order.
    """
    likeness = np.full(len(features), -1.0)
    for number, mean in enumerate(others):
        if number == class_number or not len(mean):
            continue
        cosine = (features @ F.normalize(mean, dim=0)).cpu().double().numpy()
        likeness = np.where(tags[:, number] > 0, np.maximum(likeness, cosine), likeness)
    return np.lexsort((likeness, (tags > 0).sum(1)))


def _fallback(
    items: HintSet,
    tags: NDArray[np.uint8],
    number: int,
    name: str,
    own: Features,
    singles: Features,
    single: NDArray[np.int64],
    config: BankConfig,
    count: int,
    encoder: ImageEncoder,
    device: torch.device | str,
) -> Features:
    """The single-tag patches that there are, and the purest others up to K N_K."""
    subject = f"class {name}"
    rule = (
        f"has {len(own.items)} patches that carry its tag alone (at most {config.max_white:.0%} white), needs {count}"
    )
    if not config.multi_tag_fallback:
        fix = f"give {KEY}.multi_tag_fallback: true to take its purest other patches, or fewer prototypes_per_class"
        raise InputError(subject, rule, fix)
    places = np.flatnonzero((tags[:, number] > 0) & (single < 0))
    mixed = bank_features(items, places, encoder, config, device)
    mixed = mixed.where(mixed.white <= config.max_white)
    if len(own.items) + len(mixed.items) < count:
        rule += f"; with other tags it has {len(mixed.items)} more"
        raise InputError(subject, rule, f"give it fewer prototypes ({KEY}.prototypes_per_class), or more images")
    means = [_mean(singles.features[torch.from_numpy(single[singles.items] == each)]) for each in range(tags.shape[1])]
    order = purest(mixed.features, means, tags[mixed.items], number)
    wanted = max(count * config.images_per_prototype - len(own.items), count)
    return own.joined(mixed.at(order[:wanted]))


def _mean(features: Tensor) -> Tensor:
    return features.mean(0) if len(features) else features.new_zeros(0)


def _sub_classes(
    own: Features, items: HintSet, name: str, count: int, config: BankConfig
) -> tuple[Tensor, list[SubClass]]:
    """Prototypes (K,D) of one class, and what they are made of."""
    clusters = spherical_kmeans(own.features, count, restarts=config.restarts, seed=config.seed)
    generator = np.random.default_rng([config.seed, count])
    vectors, parts = [], []
    for cluster in range(count):
        members = (clusters.labels == cluster).nonzero()[:, 0]
        order = members[clusters.similarity[members].argsort(descending=True, stable=True)]
        kept = order
        if config.selection == "nearest":
            kept = order[: config.images_per_prototype]
        elif config.selection == "random":
            number = min(config.images_per_prototype, len(order))
            drawn = np.sort(generator.permutation(len(order))[:number])
            kept = order[torch.from_numpy(drawn).to(order.device)]
        vectors.append(F.normalize(own.features[kept].mean(0), dim=0))
        places = own.items[kept.cpu().numpy()]
        similarity = tuple(round(float(each), 4) for each in clusters.similarity[kept].cpu())
        ids = tuple(item_name(items, int(place)) for place in places)
        parts.append(SubClass(name, cluster + 1, len(members), ids, tuple(int(p) for p in places), similarity))
    return torch.stack(vectors), parts
