"""Published data sets: official layout in, records with hints and masks out.

One file per data set. Class order, mask codes and the meaning of the label bits stand there and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from tissuehint.data.catalog.base import CatalogEntry, parse_bits
from tissuehint.data.records import TissueDataset
from tissuehint.errors import InputError

__all__ = ["CATALOG", "CatalogEntry", "get", "names", "parse_bits", "read"]

# name -> module and attribute; imported when asked for
_ENTRIES = {
    "glas": ("glas", "ENTRY"),
    "ebhi_seg": ("ebhi_seg", "ENTRY"),
    "wsss4luad": ("wsss4luad", "ENTRY"),
    "bcss_wsss": ("bcss_wsss", "ENTRY"),
    "luad_histoseg": ("luad_histoseg", "ENTRY"),
    "prog": ("prog", "ENTRY"),
    "gcss": ("gcss", "ENTRY"),
    "gcss_wsss": ("gcss", "ENTRY_WSSS"),
    "bcss": ("bcss", "ENTRY"),
    "camelyon16": ("camelyon16", "ENTRY"),
}


class _LazyCatalog(Mapping[str, CatalogEntry]):
    """Entries by name; the module of an entry is imported when it is looked up."""

    def __getitem__(self, name: str) -> CatalogEntry:
        module, attribute = _ENTRIES[name]
        entry = getattr(import_module(f"{__name__}.{module}"), attribute)
        assert isinstance(entry, CatalogEntry)
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(_ENTRIES)

    def __len__(self) -> int:
        return len(_ENTRIES)


CATALOG: Mapping[str, CatalogEntry] = _LazyCatalog()


def names() -> tuple[str, ...]:
    """Names of all data sets.

    Example:
        >>> names()[:3]
        ('glas', 'ebhi_seg', 'wsss4luad')
    """
    return tuple(CATALOG)


def get(name: str) -> CatalogEntry:
    """The entry of a data set.

    Raises:
        InputError: unknown name; the error lists the nearest known ones.

    Example:
        >>> get("glas").labels.names
        ('non-gland', 'gland')
    """
    if name not in CATALOG:
        known = difflib.get_close_matches(name.lower().replace("-", "_"), names(), n=3, cutoff=0.4) or list(names())
        rule = f"is not in the catalog (nearest: {', '.join(known)})"
        raise InputError(f"data set '{name}'", rule, "use one of these, or read your own images as a folder")
    return CATALOG[name]


def read(name: str, root: Path, scheme: str | None = None) -> TissueDataset:
    """A published data set from a folder that holds its official layout.

    Args:
        name: key in the catalog.
        root: folder of the unpacked release.
        scheme: how to split it, one of ``get(name).splits``; None takes the first.

    Returns:
        Records of ``train``, ``val`` and ``test`` with masks that read as class indices of ``get(name).labels``.

    Raises:
        InputError: unknown name or scheme, or a folder, file or label that the layout asks for is missing.
    """
    return get(name).read(Path(root), scheme)
