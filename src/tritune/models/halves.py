"""A number of fp32 as two of 16 bits: the bf16 number next to it, which products are computed with, and what is left.

Nothing is lost, and weights that are trained over a bf16 base need no copy beside their fp32 master (Split-SGD, Kalamkar et
al. 2020, arXiv:2005.04680). The sum of the two bit patterns, the first shifted by 16, is the pattern of the fp32 number.
Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: what is added to a bit pattern so that cutting off its lower half rounds it
_HALF = 1 << 15


def halved(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bf16 numbers (of two equally near ones that with the larger absolute value), and the rest as int16.
    `wide` is fp32 and finite."""
    near, rest = torch.empty_like(wide, dtype=torch.bfloat16), torch.empty_like(wide, dtype=torch.int16)
    halve(wide.clone(), near, rest)
    return near, rest


def halve(wide: Tensor, near: Tensor, rest: Tensor) -> None:
    """The same into two tensors that are there; `wide` is used up."""
    bits = wide.view(torch.int32)
    rest.copy_(bits)  # its lower half, as a signed number
    near.view(torch.int16).copy_(bits.add_(_HALF).bitwise_right_shift_(16))


def whole(near: Tensor, rest: Tensor) -> Tensor:
    """The fp32 numbers."""
    return make_whole(near, rest, torch.empty_like(near, dtype=torch.float32))


def make_whole(near: Tensor, rest: Tensor, wide: Tensor) -> Tensor:
    """The same into `wide`."""
    wide.view(torch.int32).copy_(near.view(torch.int16)).bitwise_left_shift_(16).add_(rest)
    return wide
