"""A store of what was used last, bounded by its size in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Cache(Generic[Value]):
    """Keeps the values that were used last; threads may share it.

    Args:
        limit: bytes that are kept at most.
        size: bytes of a value.

    Example:
        >>> cache = Cache(3, len)
        >>> [cache.get(name, lambda name=name: name.encode()) for name in ("ab", "cd")]
        [b'ab', b'cd']
        >>> cache.bytes
        2
    """

    def __init__(self, limit: int, size: Callable[[Value], int]) -> None:
        self.limit, self._size = limit, size
        self.bytes = 0
        self._kept: OrderedDict[Hashable, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key; made where it is not kept. Two threads may make the same one at a time."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        value = make()
        self._keep(key, value)
        return value

    def _keep(self, key: Hashable, value: Value) -> None:
        size = self._size(value)
        if size > self.limit:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = value
            self.bytes += size
            while self.bytes > self.limit:
                _, oldest = self._kept.popitem(last=False)
                self.bytes -= self._size(oldest)
