"""Where the file of a mapped slide lies now."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from tissuehint.slides.view.paths import inside
from tissuehint.slides.view.record import Geometry

MOST_FILES = 200_000  # of the folders that are searched


class SlideFinder:
    """Finds slide files in the opened folder and in the folders of ``--slides``, and nowhere else.

    Args:
        root: the opened folder, resolved.
        slides: folders of ``--slides``, resolved.
    """

    def __init__(self, root: Path, slides: Sequence[Path]) -> None:
        self.root, self.slides = root, list(slides)
        self._index: dict[str, list[Path]] | None = None
        self._lock = threading.Lock()

    def find(self, geometry: Geometry) -> tuple[Path | None, str]:
        """The file of a slide, and why there is none.

        It is where it was recorded, or else a file of that name in a folder of ``--slides``; its size must be the
        recorded one. A recorded path outside of the opened folders is not even looked at: it may name another computer.

        Returns:
            The resolved path and an empty text; or None and one line for the user.
        """
        name, others = geometry.file_name, []
        for path in self._candidates(geometry.path, name):
            if path.stat().st_size == geometry.bytes:
                return path, ""
            others.append(path)
        if others:
            size = others[0].stat().st_size
            return None, f"{others[0]} has {size} bytes, the slide that was mapped has {geometry.bytes}"
        if self.slides:
            where = ", ".join(map(str, self.slides))
            fix = "give its folder with --slides (links that lead out of these folders are not followed)"
            return None, f"no file {name} in {where}; {fix}"
        folder = geometry.path[: -len(name)].rstrip("/\\") or "FOLDER"
        return None, f"to see the slide itself, start with --slides {_quoted(folder)}"

    def _candidates(self, recorded: str, name: str) -> list[Path]:
        folders = (self.root, *self.slides)
        found = []
        path = Path(recorded)
        if any(path.is_relative_to(folder) for folder in folders):
            found.append(inside(path, *folders))
        if name not in ("", ".", ".."):
            near = [inside(folder / name, *folders) for folder in self.slides]
            if not any(near) and not any(found):
                near = [inside(path, *folders) for path in self._by_name().get(name, [])]
            found += near
        return [path for path in dict.fromkeys(found) if path is not None and path.is_file()]

    def _by_name(self) -> dict[str, list[Path]]:
        """Files under the folders of ``--slides`` by name; listed once, links to folders are not followed."""
        with self._lock:
            if self._index is None:
                self._index = {}
                count = 0
                for folder in self.slides:
                    for place, _, files in os.walk(folder):
                        for file in files:
                            self._index.setdefault(file, []).append(Path(place, file))
                        count += len(files)
                        if count > MOST_FILES:
                            return self._index
            return self._index


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text
