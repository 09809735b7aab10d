"""Round numbers of rows, where products with ever new ones would cost memory for good.

oneDNN, which multiplies bf16 on a CPU, keeps some 0.3 MB for every number of rows that a product of some shape ever had, and
never lets go of them: 10 MB for every new number of tokens that a training step has. So there bf16 products get few different
ones: what is missing to a round number is computed, and nobody reads it. Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wanted(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype is torch.bfloat16


def missing(n: int) -> int:
    """What n lacks to a multiple of a sixteenth of the power of two below it, and of 8: 3 % on average from 128 on."""
    return -n % max(8, 1 << max(0, n.bit_length() - 5))


def filled(x: Tensor) -> Tensor:
    """With rows of zeros, the last dimension but one a round number; as it is where that is not wanted."""
    n = missing(x.shape[-2]) if wanted(x.device, x.dtype) else 0
    return F.pad(x, (0, 0, 0, n)) if n else x
