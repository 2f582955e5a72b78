"""Work that is done ahead of the one who needs it, in threads, and given in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def ahead(
    pool: ThreadPoolExecutor, items: Iterable[Item], work: Callable[[Item], Made], depth: int
) -> Iterator[tuple[Item, Made]]:
    """Items in order with what was made of them; ``depth`` of them are in the making while one is used.

    Raises:
        Exception: whatever ``work`` raised, when the turn of its item comes.
    """
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > depth:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()
