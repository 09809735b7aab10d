"""Looking up token embeddings that are trained, with a gradient made of the rows that were read.

A step reads some hundred rows of tens of thousands. Torch makes a gradient as large as the table of them, adds bf16 rows up
in bf16, and holds it beside that of a tied head, which is as large. Here what was read is added up in at least fp32, and
into the head's gradient where there is one. Its oracle is `torch.nn.functional.embedding`.
Shapes: N tokens, V vocabulary, D width, R rows that were read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritune.models.dtype import at_least_float32


def lookup(weight_VD: Tensor, tokens_N: Tensor, padding: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows (N, D) of a table, and the table once more (V, D): a tied head that reads this one has its gradient added up with
    that of the rows in one place, and no other one is made.

    Args:
        padding: a row that does not learn by being read (`padding_idx` of the module).
    """
    rows_ND, table_VD = _Lookup.apply(weight_VD, tokens_N, padding)  # type: ignore[no-untyped-call]
    return rows_ND, table_VD


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_N: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens_N)
        ctx.shape, ctx.padding = weight_VD.shape, padding
        ctx.set_materialize_grads(False)
        return torch.nn.functional.embedding(tokens_N, weight_VD), weight_VD.view_as(weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ND: Tensor | None, g_VD: Tensor | None) -> tuple[Tensor | None, None, None]:
        (tokens_N,) = ctx.saved_tensors
        if g_ND is None:
            return g_VD, None, None
        read_R, place_N = tokens_N.unique(return_inverse=True)
        wide_ND = at_least_float32(g_ND)
        sum_RD = wide_ND.new_zeros(len(read_R), wide_ND.shape[1]).index_add_(0, place_N, wide_ND)
        if ctx.padding is not None:
            sum_RD[read_R == ctx.padding] = 0
        if g_VD is None:
            g_VD = g_ND.new_zeros(ctx.shape)
        return g_VD.index_add_(0, read_R, sum_RD.to(g_VD.dtype)), None, None
