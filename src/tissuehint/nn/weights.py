"""Weights from a file into a backbone, strictly: every tensor of the backbone is found, or the file is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tissuehint.errors import InputError

# what trainers and multi-GPU wrappers put before the names of a backbone
WRAPPERS = frozenset(
    {"module", "model", "encoder", "backbone", "network", "net", "trunk", "student", "teacher", "_orig_mod"}
)
# where checkpoints keep their tensors, beside optimiser state and the like
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "teacher", "student")
# computed at construction; older files carry them, newer ones don't
DERIVED = ("num_batches_tracked", "relative_position_index", "relative_coords_table", "attn_mask")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


@dataclass(frozen=True)
class LoadedWeights:
    """What was read into a backbone.

    Args:
        source: the file, or ``hub``.
        loaded: number of tensors read into the backbone.
        ignored: names in the file that the backbone has no place for (classifiers, other parts of a larger model).
    """

    source: str
    loaded: int
    ignored: tuple[str, ...] = ()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a weights file, on the CPU.

    Safetensors, or a torch checkpoint opened with ``weights_only=True``; a ``state_dict`` (or the like) inside a
    checkpoint is opened.

    Raises:
        InputError: missing file, unknown suffix, truncated or unreadable file, no tensors inside.
    """
    if not path.is_file():
        raise InputError(path, "weights file does not exist", "give an existing file, or weights: none")
    if path.suffix not in SUFFIXES:
        raise InputError(path, f"weights files end in {', '.join(SUFFIXES)}", "convert the file to .safetensors")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the unpickler raises
        rule = f"cannot be read as tensors only ({_first_line(error)})"
        raise InputError(path, rule, "get the file again, or save its state_dict as .safetensors") from error
    return _open_containers(path, content)


def load_backbone(backbone: nn.Module, path: str | Path, full_model: Iterable[str] = ()) -> LoadedWeights:
    """Read a weights file into ``backbone``.

    Names are compared after removal of a common prefix (``module.``, ``encoder.``, ``backbone.model.``, ...) and with
    dots as underscores, because timm's feature extractors flatten ``stages.0`` to ``stages_0``. Every tensor of the
    backbone must be in the file with the same shape. Names in the file beyond the backbone are ignored where they
    belong to other parts (classifiers, decoders), and are an error where they belong to a part that the backbone
    has (``layer1.2`` offered to a network whose ``layer1`` ends at 1): the file is then of a larger relative.

    Args:
        backbone: receives the tensors in place; untouched when the file is refused.
        path: the file.
        full_model: names of the tensors of the whole published network, where ``backbone`` is a cut of it.

    Raises:
        InputError: as ``read_tensors``, and for a file of another architecture.
    """
    path = Path(path).expanduser()
    tensors = read_tensors(path)
    own = _canonical_names(backbone.state_dict())
    offered = best_prefix(tensors, own)
    needed = {name for name in own if not name.endswith(DERIVED)}
    missing = sorted(own[name] for name in needed - offered.keys())
    if missing:
        rule = (
            f"has {len(needed) - len(missing)} of the {len(needed)} tensors of the encoder; missing: {_some(missing)}"
        )
        raise InputError(path, rule, "give weights of the same architecture, or change the encoder's name")
    state = backbone.state_dict()
    matched = {own[name]: tensors[offered[name]] for name in own.keys() & offered.keys()}
    wrong = sorted(name for name, tensor in matched.items() if tensor.shape != state[name].shape)
    if wrong:
        name = wrong[0]
        rule = f"'{name}' is {list(matched[name].shape)}, the encoder needs {list(state[name].shape)}"
        raise InputError(path, rule, "give weights of the same architecture, or change the encoder's name")
    known = own.keys() | {canonical(name) for name in full_model}
    _refuse_larger_relative(path, [offered[name] for name in offered.keys() - known], own.values())
    backbone.load_state_dict(matched, strict=False)
    used = {offered[name] for name in own.keys() & offered.keys()}
    return LoadedWeights(str(path), len(matched), tuple(sorted(tensors.keys() - used)))


def canonical(name: str) -> str:
    """The name of a tensor, the same in a published model and in timm's flattened feature extractor."""
    return name.replace(".", "_")


def best_prefix(tensors: Iterable[str], own: Mapping[str, Any]) -> dict[str, str]:
    """The wrapper prefix under which most names of ``tensors`` are names of ``own``.

    Returns:
        Canonical name to name in the file, for the names under that prefix.
    """
    names = list(tensors)
    candidates = sorted({prefix for name in names for prefix in _wrapper_prefixes(name)}, key=len)
    stripped = {
        prefix: {canonical(name.removeprefix(prefix)): name for name in names if name.startswith(prefix)}
        for prefix in candidates
    }
    best = max(candidates, key=lambda prefix: len(stripped[prefix].keys() & own.keys()))
    return stripped[best]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        rule = f"is not a whole safetensors file ({_first_line(error)})"
        raise InputError(path, rule, "get the file again") from error
    if not tensors:
        raise InputError(path, "holds no tensors", "give a file with the weights of an encoder")
    return tensors


def _open_containers(path: Path, content: object) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    raise InputError(path, "holds no named tensors", "save the state_dict of the encoder as .safetensors")


def _canonical_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Canonical name to own name; the prefix ``model.`` of timm's getter networks is dropped."""
    whole = all(name.startswith("model.") for name in state)
    return {canonical(name.removeprefix("model.") if whole else name): name for name in state}


def _wrapper_prefixes(name: str) -> list[str]:
    prefixes, prefix = [""], ""
    for part in name.split(".")[:-1]:
        if part not in WRAPPERS:
            break
        prefix += f"{part}."
        prefixes.append(prefix)
    return prefixes


def _refuse_larger_relative(path: Path, extra: list[str], own: Iterable[str]) -> None:
    parts = {_part(name) for name in own}
    foreign = sorted(name for name in extra if _part(name) in parts and not name.endswith(DERIVED))
    if foreign:
        rule = f"has {len(foreign)} tensors more than this architecture: {_some(foreign)}"
        raise InputError(path, rule, "give weights of the same architecture, or change the encoder's name")


def _part(name: str) -> str:
    """The part of a network that a tensor belongs to: ``layer1``, ``stages`` (also of ``stages_0``)."""
    words = name.split(".")
    while len(words) > 1 and words[0] in WRAPPERS:
        words = words[1:]
    return re.sub(r"_\d+$", "", words[0])


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
