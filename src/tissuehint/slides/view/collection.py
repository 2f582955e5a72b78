"""The opened folder: which slides it holds, looked up by name only."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

from tissuehint.errors import InputError
from tissuehint.slides.view.locate import SlideFinder
from tissuehint.slides.view.opened import OpenedMap
from tissuehint.slides.view.paths import inside
from tissuehint.slides.view.record import RECORD, SlideRecord, read_record

OPENED = 3  # slides whose files are kept open


class Collection:
    """The slides under a folder that ``tissuehint predict`` wrote.

    Args:
        root: that folder; or the folder of one slide.
        slides: folders of slide files that may be read, beside ``root``.

    Raises:
        InputError: no such folder, or one without any slide.
    """

    def __init__(self, root: Path, slides: Sequence[Path] = ()) -> None:
        for folder, option in [(root, str(root)), *((folder, f"--slides {folder}") for folder in slides)]:
            if not folder.is_dir():
                rule = "is not a folder" if folder.exists() else "does not exist"
                raise InputError(option, rule, "check the path")
        self.root = root.resolve()
        self.finder = SlideFinder(self.root, [folder.resolve() for folder in slides])
        self._records: dict[str, SlideRecord] = {}
        self._opened: dict[str, OpenedMap] = {}
        self._scanning, self._opening = threading.Lock(), threading.Lock()
        if not self.scan():
            fix = "give the folder that tissuehint predict MODEL SLIDE... --out FOLDER wrote"
            raise InputError(root, f"holds no slide with a {RECORD}", fix)

    def scan(self) -> list[SlideRecord]:
        """All slides by name, as they are now; files that did not change are not read again."""
        with self._scanning:
            before = self._records
            found = (self._read(folder, before.get(folder.name)) for folder in self._folders())
            records = {record.key: record for record in found if record is not None}
            self._records = dict(sorted(records.items(), key=lambda item: natural(item[0])))
            return self.records()

    def records(self) -> list[SlideRecord]:
        """All slides by name, as last scanned."""
        return list(self._records.values())

    def record(self, key: str) -> SlideRecord | None:
        """A slide by the name of its folder, as last scanned."""
        return self._records.get(key)

    def opened(self, record: SlideRecord) -> OpenedMap:
        """The files of a finished slide; those of the slides that were asked for last stay open.

        What is dropped here is closed when the last thread that reads it has let go.
        """
        with self._opening:
            held = self._opened.pop(record.key, None)
            if held is None or held.record.version != record.version:
                held = OpenedMap(record, self.finder)
            self._opened[record.key] = held
            for key in list(self._opened)[:-OPENED]:
                del self._opened[key]
            return held

    def _folders(self) -> list[Path]:
        if (self.root / RECORD).is_file():
            return [self.root]
        # a name that starts with a dot is work in progress
        named = [path for path in self.root.iterdir() if not path.name.startswith(".") and _is_text(path.name)]
        inner = [inside(path, self.root) for path in named]
        return [folder for folder in inner if folder is not None and (folder / RECORD).is_file()]

    def _read(self, folder: Path, before: SlideRecord | None) -> SlideRecord | None:
        try:
            facts = (folder / RECORD).stat()
        except OSError:  # deleted since the folder was listed
            return None
        version = f"{facts.st_mtime_ns:x}-{facts.st_size:x}-{facts.st_ino:x}"
        return before if before is not None and before.version == version else read_record(folder, version)


def _is_text(name: str) -> bool:
    """Whether a name is one that an address can hold; on Linux any bytes are a name."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts slide 2 before slide 10.

    Example:
        >>> sorted(["s10", "s2"], key=natural)
        ['s2', 's10']
    """
    parts = re.split(r"(\d+)", text.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
