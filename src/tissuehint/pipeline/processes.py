"""Several processes of one run: who writes, who does which image, how results come together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only

Item = TypeVar("Item")


def is_writer() -> bool:
    """Whether this process writes the run directory: the first of all processes, also before they are connected."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def connected() -> bool:
    """Whether the processes of the run can talk to each other yet (from the first multi-process fit on)."""
    return dist.is_available() and dist.is_initialized()


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items of this process: every n-th, all of them where it is alone."""
    return items[dist.get_rank() :: dist.get_world_size()] if connected() else items


def gather(value: Item) -> list[Item]:
    """The values of all processes, in order of their rank, in every process."""
    if not connected():
        return [value]
    values: list[Item | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return [item for item in values if item is not None]


def wait_for_all() -> None:
    """Return once every process has come here."""
    if connected():
        dist.barrier()
