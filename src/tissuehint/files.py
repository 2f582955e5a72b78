"""Files that are either whole or absent: write beside the target, then rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALLEST_FREE = 64 * 1024  # bytes; with less, a write that failed has filled the disk


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Give a temporary path in the folder of ``target``; rename it to ``target`` on success, remove it on error.

    The temporary name keeps the suffix of ``target`` (libraries choose the format by it) and starts with a dot, so
    that no reader takes it for data. Readers see the old file or the new one, never a part.

    Raises:
        OSError: as the file system says (a full disk, say), naming ``target``; the temporary file is gone by then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem[:80]}.", suffix=f".part{target.suffix}", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_UMASK)
        part.replace(target)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename not in (None, str(part)):
                raise
            # the user knows the target, not its temporary name; some libraries name no file at all
            raise OSError(error.errno, error.strerror, str(target)) from error
        if shutil.disk_usage(part.parent).free > SMALLEST_FREE:
            raise
        # numpy, torch and safetensors report a full disk as errors of their own
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error
    finally:
        part.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write ``text`` (UTF-8) atomically."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as indented JSON atomically; NaN and infinity become ``null``."""
    write_text(target, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_palette_png(target: Path, mask: NDArray[np.uint8], palette: list[int]) -> None:
    """Write a class mask atomically as a palette PNG.

    Args:
        target: file to write.
        mask: (H,W) uint8 class indices, 255 for ignore.
        palette: 768 numbers, red green blue of the 256 indices (``LabelSpace.palette()``).
    """
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8))
    picture.putpalette(palette)
    with atomic_path(target) as part:
        picture.save(part, format="PNG")


def finite(value: Any) -> Any:
    """As JSON gives it back: plain lists and numbers, None for NaN and infinity, text for paths."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, np.generic):
        return finite(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
