"""Attention over packed rows in one call of torch's variable-length kernel: what runs on a GPU in 16-bit formats.

Every span sees what stands before it, then itself up to each query: with its keys side by side that is plain causal attention
of a row whose queries are its last tokens. No padding, no mask, no groups. `tiles.py` group by group is its slow twin,
and does what the kernel cannot: soft caps, wide formats, processors.
Shapes: N packed tokens, T keys of all spans side by side, H query heads, K key heads, d head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritune.models.base import Span
from tritune.models.dtype import at_least_float32

#: widest head of the kernel, and what widths are multiples of
WIDEST, STEP = 256, 8


@dataclass(frozen=True, slots=True)
class Rows:
    """The spans of a batch as the kernel wants them.

    Attributes:
        query_ends, key_ends: (spans + 1), int32, from 0: where each span's queries and keys end.
        longest: no span has more queries, or more keys.
        key_T: which keys those are; None: all of them, in their order.
    """

    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]
    key_T: Tensor | None

    def rounded(self) -> Rows:
        """With powers of two for `longest`, in which more batches are alike."""
        queries, keys = (1 << (n - 1).bit_length() for n in self.longest)
        return replace(self, longest=(queries, keys))


def rows_of(spans: Sequence[Span], computed: Sequence[int], device: torch.device) -> Rows:
    """How the kernel wants a batch.

    Args:
        spans: where the keys of each lie, and what it sees.
        computed: those whose queries run.
    """
    ordered = sorted(computed, key=lambda i: spans[i].start)
    seen = [(*spans[i].parents, i) for i in ordered]
    queries = [spans[i].length for i in ordered]
    keys = [sum(spans[j].length for j in members) for members in seen]
    key_T = None
    if len(computed) < len(spans) or any(spans[i].parents for i in ordered):
        runs = [torch.arange(s.start, s.start + s.length) for members in seen for s in (spans[j] for j in members)]
        key_T = torch.cat(runs).to(device)
    query_ends, key_ends = (
        torch.tensor([0, *accumulate(sizes)], dtype=torch.int32).to(device) for sizes in (queries, keys)
    )
    return Rows(query_ends, key_ends, (max(queries), max(keys)), key_T)


def runs_here(query: Tensor, softcap: float | None) -> bool:
    """Whether the kernel takes such queries."""
    return softcap is None and suits(query.device, query.dtype, query.shape[-1])


def suits(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel takes heads of this width there."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and narrow and width <= WIDEST and width % STEP == 0


def attend(rows: Rows, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, scale: float, window: int | None) -> Tensor:
    """(N, H, d). `window`: a query sees itself and the `window` - 1 keys before it."""
    if rows.key_T is not None:
        k_NKd, v_NKd = (_Taken.apply(t, rows.key_T) for t in (k_NKd, v_NKd))  # type: ignore[no-untyped-call]
    sides = (-1 if window is None else window - 1, 0)
    y_NHd: Tensor = _kernel()(
        q_NHd, k_NKd, v_NKd, rows.query_ends, rows.key_ends, *rows.longest, scale=scale, window_size=sides
    )
    return y_NHd


@cache
def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn  # registers what only a GPU has

    # From torch 2.12 on, fewer key heads than query heads have to be announced.
    announced = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if announced else varlen_attn


class _Taken(torch.autograd.Function):
    """Keys or values, some of them several times over. What the rows of a batch send back to a shared one is summed in fp32:
    in 16 bits the sum of many would stand still."""

    @staticmethod
    def forward(ctx: Any, x_MKd: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.like = x_MKd.shape
        return x_MKd.index_select(0, index_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TKd: Tensor) -> tuple[Tensor, None]:
        (index_T,) = ctx.saved_tensors
        wide = at_least_float32(g_TKd)
        return wide.new_zeros(ctx.like).index_add_(0, index_T, wide).to(g_TKd.dtype), None
