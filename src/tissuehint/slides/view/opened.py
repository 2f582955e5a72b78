"""A finished slide with its files open."""

from __future__ import annotations

from tissuehint.errors import InputError
from tissuehint.slides.reader import Slide
from tissuehint.slides.view.class_map import ClassMap
from tissuehint.slides.view.locate import SlideFinder
from tissuehint.slides.view.pixels import Pixels, Thumbnail, open_same
from tissuehint.slides.view.probabilities import Probabilities, open_probabilities
from tissuehint.slides.view.pyramid import Pyramid
from tissuehint.slides.view.record import CLASSES, PICTURES, SlideRecord


class OpenedMap:
    """What the viewer shows of a slide; threads may share it.

    Args:
        record: of a finished slide.
        finder: of its file.

    Raises:
        InputError: a class map that cannot be read. What else is missing or damaged stands in ``notes``.
    """

    def __init__(self, record: SlideRecord, finder: SlideFinder) -> None:
        path = record.file(CLASSES)
        if record.geometry is None or path is None:
            raise InputError(record.key, "has no class map", "predict this slide again")
        self.record, self.geometry = record, record.geometry
        self.pyramid = Pyramid(self.geometry.height, self.geometry.width)
        self.notes: list[str] = []
        self.classes = ClassMap(path, self.geometry)
        self.probabilities = self._probabilities()
        thumbnail = self._thumbnail()
        self.pixels = Pixels(self._slide(finder, thumbnail is not None), thumbnail)

    def _probabilities(self) -> Probabilities | None:
        try:
            return open_probabilities(self.record)
        except Exception as error:  # zarr has many of its own
            self.notes.append(f"No probabilities: {error}")
            return None

    def _slide(self, finder: SlideFinder, has_thumbnail: bool) -> Slide | None:
        path, missing = finder.find(self.geometry)
        if path is not None:
            try:
                return open_same(path, self.geometry)
            except (InputError, OSError) as error:
                missing = str(error)
        what = "The thumbnail is shown in place of the slide" if has_thumbnail else "The slide is not shown"
        self.notes.append(f"{what}: {missing}")
        return None

    def _thumbnail(self) -> Thumbnail | None:
        path = self.record.file(PICTURES[0])
        if path is None:
            return None
        try:
            return Thumbnail(path, self.geometry)
        except (OSError, ValueError, SyntaxError) as error:
            self.notes.append(f"No thumbnail: {error}")
            return None
