"""Attention behind chosen stages of an encoder, so that all later stages see what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.attention import ConsistencyCorrelationAttention, CrissCrossAttention
from tissuehint.nn.encoders import Encoder, probe_image

AttentionName = Literal["none", "criss_cross", "criss_cross_twice", "consistency_correlation"]

# Table 3 of Feng et al. 2025 compares these three
ATTENTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "criss_cross": CrissCrossAttention,
    "criss_cross_twice": lambda channels, reduction: nn.Sequential(
        CrissCrossAttention(channels, reduction), CrissCrossAttention(channels, reduction)
    ),
    "consistency_correlation": ConsistencyCorrelationAttention,
}
# how a stage lays out what the pyramid gives as (B,C,h,w): the same, channels last, or tokens (B,n,C)
Layout = Literal["maps", "channels_last", "tokens"]


class StageAttention(nn.ModuleList):
    """One attention for each chosen level of an encoder, hooked in behind the stage that makes the level.

    The weights are here, not in the encoder: they are new parts, trained at the rate of those.

    Args:
        encoder: receives the hooks; from then on its maps are those after attention.
        name: which attention.
        levels: of the encoder's pyramid, counted as in a Python list: -1 is the coarsest.
        reduction: queries and keys have channels / reduction channels.

    Raises:
        InputError: a level that the encoder does not have or that is given twice, or whose map no single stage of the
            backbone makes.
    """

    def __init__(self, encoder: Encoder, name: str, levels: Sequence[int], reduction: int) -> None:
        chosen = _indices(encoder, levels)
        super().__init__(ATTENTIONS[name](encoder.channels[index], reduction) for index in chosen)
        found = {index: _find_stage(encoder, index) for index in chosen}
        for attention, (index, place) in zip(self, found.items(), strict=True):
            if place is None:
                rule = f"has no single stage that makes level {index - len(encoder.channels)} of its pyramid"
                fix = "choose other levels, attention: none, or another encoder"
                raise InputError(f"encoder '{encoder.config.name}'", rule, fix)
            stage, layout = place
            stands = _Place(encoder, attention, layout, encoder.strides[index])
            stage.register_forward_hook(stands.after_stage, prepend=True)


class _Place:
    """Where an attention stands. Hooks are its bound methods, so that a deep copy of the network is whole."""

    def __init__(self, encoder: Encoder, attention: nn.Module, layout: Layout, stride: int) -> None:
        self.attention, self.layout, self.stride = attention, layout, stride
        self.size = (0, 0)
        if layout == "tokens":
            encoder.backbone.register_forward_pre_hook(self.before_backbone)

    def before_backbone(self, backbone: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Tokens do not say how many rows they have; the image does."""
        height, width = inputs[0].shape[-2:]
        self.size = height // self.stride, width // self.stride

    def after_stage(self, stage: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """The output of the stage, attended."""
        if self.layout == "maps":
            attended: Tensor = self.attention(output)
            return attended
        if self.layout == "channels_last":
            turned: Tensor = self.attention(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return turned.contiguous()
        height, width = self.size
        first = output.shape[1] - height * width  # class and register tokens
        maps = output[:, first:].transpose(1, 2).reshape(len(output), -1, height, width)
        return torch.cat([output[:, :first], self.attention(maps).flatten(2).transpose(1, 2)], 1)


def _indices(encoder: Encoder, levels: Sequence[int]) -> list[int]:
    count = len(encoder.channels)
    for level in levels:
        if not -count <= level < count:
            rule = f"is not a level of encoder '{encoder.config.name}', which has {count}"
            raise InputError(f"attention level {level}", rule, f"give numbers from -{count} (finest) to -1 (coarsest)")
    chosen = sorted({level % count for level in levels})
    if len(chosen) < len(levels):
        raise InputError(f"attention levels {list(levels)}", "name a level twice", "name each level once")
    return chosen


@torch.no_grad()
def _find_stage(encoder: Encoder, index: int) -> tuple[nn.Module, Layout] | None:
    """The outermost module of the backbone whose output is the map of a level, and that all later stages build on.

    Found by looking at one image. That the output is equal is not enough (a layer that changes nothing at its start, a
    norm that stands beside the way to the next stage): changing it must change this level alike and all later ones.
    """
    image = probe_image(encoder)
    outputs: list[tuple[nn.Module, Tensor]] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            outputs.append((module, output.clone()))  # layers behind it may work in place

    with _evaluating(encoder), _hooks(encoder.backbone.modules(), record):
        maps = _look(encoder, image)
    # an outer module ends after its parts
    candidates = {module: layout for module, output in outputs if (layout := _layout(output, maps[index])) is not None}
    for module, layout in reversed(candidates.items()):
        with _evaluating(encoder), _hooks([module], _change):
            changed = _look(encoder, image)
        before = all(torch.equal(a, b) for a, b in zip(maps[:index], changed[:index], strict=True))
        behind = not any(torch.equal(a, b) for a, b in zip(maps[index + 1 :], changed[index + 1 :], strict=True))
        if before and behind and torch.equal(changed[index], _changed(maps[index])):
            return module, layout
    return None


def _look(encoder: Encoder, image: Tensor) -> list[Tensor]:
    try:
        return encoder(image)  # type: ignore[no-any-return]
    except (RuntimeError, AssertionError, InputError) as error:
        rule = f"cannot be looked into with an image of {image.shape[-2]} x {image.shape[-1]} pixels"
        raise InputError(f"encoder '{encoder.config.name}'", rule, "use attention: none, or another encoder") from error


def _changed(values: Tensor) -> Tensor:
    return 2 * values + 1


def _change(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return _changed(output)


def _layout(output: Tensor, level: Tensor) -> Layout | None:
    """How the output holds the map of a level, or None where it does not."""
    tokens = level.flatten(2).transpose(1, 2)
    if output.shape == level.shape and torch.equal(output, level):
        return "maps"
    if output.ndim == 4 and torch.equal(output.permute(0, 3, 1, 2), level):
        return "channels_last"
    # class and register tokens stand before those of the image
    if output.ndim == 3 and torch.equal(output[:, -tokens.shape[1] :], tokens):
        return "tokens"
    return None


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Before all other hooks: some backbones read their maps with hooks of their own."""
    handles = [module.register_forward_hook(hook, prepend=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
