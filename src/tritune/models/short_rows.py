"""Attention of many short rows as plain batched products, with the backward written out.

For rows of tens of tokens this is several times faster than a fused attention kernel: query heads that share a key head are
folded into the rows of one product, spans into its batch, and all spans meet the keys they share in one product of its own.
What `attention.py` does group by group through autograd is its slow twin, and stands in for long rows and soft caps.
Shapes: N packed tokens, H query heads, K key heads, G = H / K, d head width, B spans of a group, L its queries, R = G * L,
P keys that all its spans share, S its other keys, T = P + S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritune.models.dtype import at_least_float32
from tritune.models.layout import Group, Layout
from tritune.models.round_numbers import filled


class ShortRows(torch.autograd.Function):
    """(H, N, d) from queries (H, N, d), keys (K, N, d), values (K, N, d), positions already applied."""

    @staticmethod
    def forward(
        ctx: Any, q_HNd: Tensor, k_KNd: Tensor, v_KNd: Tensor, layout: Layout, scale: float, window: int | None
    ) -> Tensor:
        (H, N, _), K = q_HNd.shape, k_KNd.shape[0]
        q_KMd = q_HNd.reshape(K, H // K * N, -1)
        outputs, saved = [], list[Tensor]()
        for group in layout.groups:
            index, _ = group.folded(H // K, N)
            B, S = group.key_BS.shape
            q = q_KMd.index_select(1, index).mul_(scale)
            k, v = (t.index_select(1, group.key_BS.flatten()).view(K * B, S, -1) for t in (k_KNd, v_KNd))
            k_P, v_P = (t.index_select(1, group.shared_P) for t in (k_KNd, v_KNd))
            weight = _weights(group, q, k, k_P, window)
            y = (weight[..., len(group.shared_P) :] @ v).view(K, q.shape[1], -1)
            if len(group.shared_P):
                y += _times(_shared(weight, k_P), v_P)
            outputs.append(y)
            saved += [q, k, v, k_P, v_P, weight]
        ctx.save_for_backward(*saved)
        ctx.layout, ctx.scale, ctx.shapes = layout, scale, (q_HNd.shape, k_KNd.shape, v_KNd.shape)
        return _joined(outputs).index_select(1, layout.unfolded(H // K, N)).view(H, N, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_HNd: Tensor) -> tuple[Tensor | None, ...]:
        (H, N, d), (K, _, _), _ = ctx.shapes
        saved = ctx.saved_tensors
        g_KMd = g_HNd.reshape(K, H // K * N, -1)
        grads_q, grads_k, grads_v = [], [], []
        shared_k, shared_v = [], []
        for i, group in enumerate(ctx.layout.groups):
            q, k, v, k_P, v_P, weight = saved[6 * i : 6 * i + 6]
            index, padding = group.folded(H // K, N)
            g = g_KMd.index_select(1, index)
            if padding is not None:
                g.index_fill_(1, padding, 0.0)
            P = len(group.shared_P)
            g_BRd, q_BRd = (t.view(k.shape[0], -1, t.shape[-1]) for t in (g, q))
            own = weight[..., P:]
            grad_weight = g_BRd @ v.transpose(-1, -2)
            grads_v.append((own.transpose(-1, -2) @ g_BRd).view(K, -1, v.shape[-1]))
            if P:
                of_shared = _times(g, v_P.transpose(-1, -2)).reshape(*weight.shape[:-1], P)
                grad_weight = torch.cat([of_shared, grad_weight], -1)
                shared_v.append(_summed(_shared(weight, k_P), g))
            slope = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad = (slope[..., P:] @ k).view(K, -1, d)
            grads_k.append((slope[..., P:].transpose(-1, -2) @ q_BRd).view(K, -1, d))
            if P:
                shared = _shared(slope, k_P)
                grad += _times(shared, k_P)
                shared_k.append(_summed(shared, q))
            grads_q.append(grad)
        grad_q = _joined(grads_q).index_select(1, ctx.layout.unfolded(H // K, N)).mul_(ctx.scale)
        M = ctx.shapes[1][1]
        grad_k, grad_v = (
            _of_keys(ctx.layout, M, own, shared) for own, shared in ((grads_k, shared_k), (grads_v, shared_v))
        )
        return grad_q.view(H, N, d), grad_k, grad_v, None, None, None


def _joined(of_groups: Sequence[Tensor]) -> Tensor:
    return of_groups[0] if len(of_groups) == 1 else torch.cat(list(of_groups), 1)


def _of_keys(layout: Layout, n: int, own: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """(K, n, d): what the groups found for their spans' keys (K, B * S, d) and their shared ones (K, P, d), by key."""
    found, once = _joined(own), layout.read_once
    by_key = found.new_zeros(found.shape[0], n, found.shape[-1])
    if once is not None:  # nothing adds up, and to copy is several times faster
        by_key.index_copy_(1, once.keys, found.index_select(1, once.places))
    else:
        by_key.index_add_(1, torch.cat([group.key_BS.flatten() for group in layout.groups]), found)
    for group, part in zip((group for group in layout.groups if len(group.shared_P)), shared, strict=True):
        by_key.index_add_(1, group.shared_P, part)
    return by_key


def _weights(group: Group, q_KMd: Tensor, k_BSd: Tensor, k_KPd: Tensor, window: int | None) -> Tensor:
    """Attention weights (K * B, R, T)."""
    (K, P, d), B = k_KPd.shape, group.query_BL.shape[0]
    score = q_KMd.view(K * B, -1, d) @ k_BSd.transpose(-1, -2)
    if P:
        score = torch.cat([_times(q_KMd, k_KPd.transpose(-1, -2)).reshape(K * B, -1, P), score], -1)
    hidden_BLT = group.hidden(window)
    score.view(K, B, -1, *hidden_BLT.shape[1:]).masked_fill_(hidden_BLT[None, :, None], float("-inf"))
    return torch.softmax(at_least_float32(score), -1).to(q_KMd.dtype)


def _shared(weight_BRT: Tensor, k_KPd: Tensor) -> Tensor:
    """The columns of the shared keys as (K, B * R, P)."""
    K, P, _ = k_KPd.shape
    return weight_BRT[..., :P].reshape(K, -1, P)


def _times(x_KRa: Tensor, y_Kab: Tensor) -> Tensor:
    """x y, of queries that are as many as they happen to be."""
    return (filled(x_KRa) @ y_Kab)[:, : x_KRa.shape[1]]


def _summed(x_KRa: Tensor, y_KRb: Tensor) -> Tensor:
    """xᵀ y, over these."""
    return filled(x_KRa).transpose(-1, -2) @ filled(y_KRb)
