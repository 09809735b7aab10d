"""The optimizer and its rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from tritune.run import Training


def rate(training: Training, peak: float, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of `total`: linear warm-up, then decay to zero after the last."""
    warm = math.ceil(training.warmup * total)
    if step <= warm:
        return peak * step / warm
    left = (total - step + 1) / (total - warm + 1)
    if training.schedule == "linear":
        return peak * left
    if training.schedule == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * left))
    return peak


def adamw(
    parameters: Mapping[str, nn.Parameter], training: Training, factors: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), the fused kernel; the loop sets the rate by `set_rate`.

    Args:
        factors: what the rate of a parameter is multiplied by, by name; 1 where nothing is said.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((factors or {}).get(name, 1.0), []).append(parameter)
    given = [{"params": members, "factor": factor} for factor, members in groups.items()]
    return torch.optim.AdamW(given, lr=0.0, weight_decay=training.weight_decay, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the coming step, for every group times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
