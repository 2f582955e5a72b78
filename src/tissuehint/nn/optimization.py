"""Optimisers and the polynomial learning-rate schedule that the papers share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Optimization(BaseModel):
    """How a network is trained.

    The learning rate of step t of T is base x (1 - t/T)^power, after a linear warm-up over the first
    ``warmup`` steps (DeepLab-v2, Chen et al. 2017, Section 4.1: power .9).

    Args:
        name: ``sgd`` (momentum .9 unless said) or ``adamw``.
        learning_rate: base rate of the pretrained encoder.
        head_multiplier: factor for newly initialised parts (the papers: 10).
        weight_decay: on weights; biases and norms have none.
        momentum: of SGD.
        power: of the polynomial schedule; 0 keeps the rate.
        warmup: steps of linear warm-up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["sgd", "adamw"] = "adamw"
    learning_rate: float = Field(default=1e-4, gt=0)
    head_multiplier: float = Field(default=10.0, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    power: float = Field(default=0.9, ge=0)
    warmup: int = Field(default=0, ge=0)


def build_optimizer(config: Optimization, network: nn.Module, total_steps: int) -> Any:
    """Optimiser and schedule in the form Lightning takes.

    Args:
        config: rates.
        network: its ``encoder`` learns at the base rate, all else at ``head_multiplier`` times it (Chen et al. 2018,
            Section 4.1: 10). Frozen parameters are left out.
        total_steps: T of the schedule, in optimiser steps.
    """
    encoder = network.encoder
    assert isinstance(encoder, nn.Module)
    inside = {id(parameter) for parameter in encoder.parameters()}
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    rates = (config.learning_rate, config.learning_rate * config.head_multiplier)
    parts = (
        [(name, each) for name, each in trained if id(each) in inside],
        [(name, each) for name, each in trained if id(each) not in inside],
    )
    groups = [
        group for part, rate in zip(parts, rates, strict=True) for group in _groups(part, rate, config.weight_decay)
    ]
    optimizer: Optimizer
    if config.name == "sgd":
        optimizer = SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    else:
        optimizer = AdamW(groups, lr=config.learning_rate)
    schedule = LambdaLR(optimizer, lambda step: polynomial(step, total_steps, config.power, config.warmup))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def polynomial(step: int, total_steps: int, power: float, warmup: int = 0) -> float:
    """Factor (1 - t/T)^power on the learning rate, times (t+1)/warmup during warm-up.

    Example:
        >>> polynomial(0, 100, 0.9), round(polynomial(50, 100, 0.9), 3), polynomial(100, 100, 0.9)
        (1.0, 0.536, 0.0)
    """
    decay = max(0.0, 1 - step / max(total_steps, 1)) ** power
    return float(decay * min(1.0, (step + 1) / warmup if warmup else 1.0))


def _groups(parameters: list[tuple[str, nn.Parameter]], rate: float, decay: float) -> list[dict[str, Any]]:
    """Weights (two or more dimensions) decay; biases, norms and single factors such as a gamma do not.

    A table of relative position biases (Swin) has two dimensions and is a bias by its name.
    """
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in parameters:
        decays = parameter.ndim > 1 and "bias" not in name.rpartition(".")[2]
        (weights if decays else others).append(parameter)
    groups = [{"params": weights, "lr": rate, "weight_decay": decay}, {"params": others, "lr": rate, "weight_decay": 0}]
    return [group for group in groups if group["params"]]
