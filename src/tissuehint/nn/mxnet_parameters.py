"""Parameter files of MXNet (``.params``), read without mxnet.

Layout (``NDArray::Save`` of MXNet, all numbers little-endian): uint64 0x112, uint64 0; uint64 number of arrays, the
arrays; uint64 number of names, each a uint64 length and its characters. An array is its shape, two int32 for the
device, an int32 for the type, and its values in C order. The shape is a uint32 rank with uint32 sides in files before
MXNet 1.0; later files put a uint32 version before the rank (the second version also an int32 for the storage) and
have int64 sides.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from tissuehint.errors import InputError

LIST_MAGIC = 0x112
VERSION_1, VERSION_2 = 0xF993FAC8, 0xF993FAC9
DENSE = 0
TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")
# a rank beyond this is not an array of a network but another file
MAXIMUM_RANK = 8


def read_mxnet_parameters(path: Path) -> dict[str, Tensor]:
    """Read the named arrays of a ``.params`` file; names keep their ``arg:`` and ``aux:``.

    Raises:
        InputError: a missing or truncated file, another format, arrays without names.
    """
    if not path.is_file():
        raise InputError(path, "weights file does not exist", "give an existing file, or weights: none")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if _numbers(file, "<QQ") != (LIST_MAGIC, 0):
                raise ValueError("no list of arrays")
            tensors = [_array(file, size) for _ in range(_count(file, size))]
            names = [_name(file, size) for _ in range(_count(file, size))]
    except ValueError as error:
        rule = f"is not a whole parameter file of MXNet ({error})"
        raise InputError(path, rule, "get the file again, or give a converted .pth or .safetensors") from error
    if len(names) != len(tensors) or not names:
        rule = f"has {len(names)} names for {len(tensors)} arrays"
        raise InputError(path, rule, "give the parameters of a whole network")
    return dict(zip(names, tensors, strict=True))


def _array(file: BinaryIO, size: int) -> Tensor:
    shape = _shape(file)
    _device_type, _device, kind = _numbers(file, "<iii")
    if not 0 <= kind < len(TYPES):
        raise ValueError(f"type {kind} of an array")
    dtype = np.dtype(TYPES[kind])
    data = _read(file, math.prod(shape) * dtype.itemsize, size)
    values = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
    return torch.from_numpy(values.reshape(shape))


def _shape(file: BinaryIO) -> tuple[int, ...]:
    (first,) = _numbers(file, "<I")
    if first not in (VERSION_1, VERSION_2):
        rank, side = first, "I"
    else:
        if first == VERSION_2 and _numbers(file, "<i") != (DENSE,):
            raise ValueError("a sparse array")
        (rank,), side = _numbers(file, "<I"), "q"
    if not 0 < rank <= MAXIMUM_RANK:
        raise ValueError(f"rank {rank} of an array")
    shape = _numbers(file, f"<{rank}{side}")
    if min(shape) < 0:
        raise ValueError(f"shape {list(shape)} of an array")
    return shape


def _name(file: BinaryIO, size: int) -> str:
    return _read(file, _count(file, size), size).decode()


def _count(file: BinaryIO, size: int) -> int:
    (count,) = _numbers(file, "<Q")
    if count > size:
        raise ValueError(f"a count of {count}")
    return count


def _numbers(file: BinaryIO, layout: str) -> tuple[int, ...]:
    length = struct.calcsize(layout)
    return struct.unpack(layout, _read(file, length, length))


def _read(file: BinaryIO, length: int, limit: int) -> bytes:
    """Exactly ``length`` bytes; ``limit`` keeps a false length from asking for all memory."""
    data = file.read(length) if length <= limit else b""
    if len(data) < length:
        raise ValueError("it ends too early")
    return data
