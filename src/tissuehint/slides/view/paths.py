"""Which files the viewer may read: those of the opened folders, links followed to their end."""

from __future__ import annotations

from pathlib import Path


def inside(path: Path, *folders: Path) -> Path | None:
    """The path with all links followed, where it exists and lies in one of the folders; None elsewhere.

    What is opened is what this gives back, so that no link stands between the check and the reading.

    Args:
        path: to check.
        folders: resolved folders.
    """
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # absent, a ring of links, a name that cannot be
        return None
    return real if any(real.is_relative_to(folder) for folder in folders) else None
