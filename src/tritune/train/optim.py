"""The optimizer and its rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    optimizer = torch.optim.AdamW(given, lr=0.0, weight_decay=training.weight_decay, fused=True)
    _lay_out_moments(optimizer, list(parameters.values()))
    return optimizer


def _lay_out_moments(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Make the moments before anything else, side by side. The optimizer itself makes them at its first step, which puts them
    between activations: with full fine-tuning the holes that these leave took hundreds of megabytes."""
    for moment in ("exp_avg", "exp_avg_sq"):
        for kind in {(p.dtype, p.device) for p in parameters}:
            alike = [p for p in parameters if (p.dtype, p.device) == kind]
            whole = torch.zeros(sum(p.numel() for p in alike), dtype=kind[0], device=kind[1])
            for p, part in zip(alike, torch.split(whole, [p.numel() for p in alike]), strict=True):
                optimizer.state[p][moment] = part.view(p.shape)
    for p in parameters:
        optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the coming step, for every group times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
