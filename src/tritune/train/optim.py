"""The optimizer and its rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def adamw(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), the fused kernel; the loop sets the rate."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=training.weight_decay, fused=True)
