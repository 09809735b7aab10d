"""Attention of many rows as plain batched products, with the backward written out.

Query heads that share a key head are folded into the rows of one product, spans into its batch, and all spans meet the keys
they share in one product of its own, where these are many. A tile takes some queries of every span and only keys that these
may see, so of long rows about half is never computed; their weights are made again in the backward instead of kept (as by
Dao et al. 2022, arXiv:2205.14135, but with whole rows of weights in a tile). On a CPU this is faster than torch's fused
kernel, from four times at 32 tokens a row to 1.4 times at 2,048 (docs/performance.md). Its oracle is attention written out
query by query, in the tests.
Shapes: N packed tokens, M keys, H query heads, K key heads, G = H / K, d head width, B spans of a group, l queries of a tile,
R = G * l, P keys that all spans of a group share and meet apart, S its other keys, s those that a tile sees, T = P + s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tritune.models.dtype import at_least_float32
from tritune.models.group import Group, Tile
from tritune.models.layout import Layout
from tritune.models.round_numbers import filled

#: weights over so many keys are kept for the backward; over more they would outgrow all else that a layer keeps
KEPT_UP_TO = 384


class Tiles(torch.autograd.Function):
    """(H, N, d) from queries (H, N, d), keys (K, M, d), values (K, M, d), positions already applied."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HNd: Tensor,
        k_KMd: Tensor,
        v_KMd: Tensor,
        layout: Layout,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        (H, N, _), K = q_HNd.shape, len(k_KMd)
        q_KGNd = _by_key_head(q_HNd, K)
        outputs, weights = [], list[Tensor]()
        for group in layout.groups:
            keys = _of_group(group, k_KMd, v_KMd)
            for tile, folded in zip(group.tiles(window), group.folded(H // K, N), strict=True):
                seen = keys.of(tile)
                weight, _ = _weights(tile, q_KGNd.index_select(1, folded.index).mul_(scale), seen, softcap)
                outputs.append(_mixed(weight, seen))
                if _is_kept(seen, softcap):
                    weights.append(weight)
        ctx.save_for_backward(q_HNd, k_KMd, v_KMd, *weights)
        ctx.layout, ctx.scale, ctx.window, ctx.softcap = layout, scale, window, softcap
        return _joined(outputs).index_select(1, layout.unfolded(H // K, N)).view(H, N, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_HNd: Tensor) -> tuple[Tensor | None, ...]:
        q_HNd, k_KMd, v_KMd, *saved = ctx.saved_tensors
        (H, N, _), (K, M, _), layout = q_HNd.shape, k_KMd.shape, ctx.layout
        weights = iter(saved)
        q_KGNd, g_KGNd = _by_key_head(q_HNd, K), _by_key_head(g_HNd, K)
        grads_q, of_groups = list[Tensor](), list[_Keys]()
        for group in layout.groups:
            keys = _of_group(group, k_KMd, v_KMd)
            slopes = []
            for tile, folded in zip(group.tiles(ctx.window), group.folded(H // K, N), strict=True):
                seen, q = keys.of(tile), q_KGNd.index_select(1, folded.index).mul_(ctx.scale)
                kept = (next(weights), None) if _is_kept(seen, ctx.softcap) else None
                g = g_KGNd.index_select(1, folded.index)
                if folded.padding is not None:
                    g.index_fill_(1, folded.padding, 0.0)
                grad_q, of_keys = _slopes(g, q, seen, *(kept or _weights(tile, q, seen, ctx.softcap)))
                grads_q.append(grad_q)
                slopes.append((tile.keys, of_keys))
            of_groups.append(_added(slopes, group.key_BS.shape[1]))
        grad_q = _joined(grads_q).index_select(1, layout.unfolded(H // K, N)).mul_(ctx.scale).view(H, N, -1)
        grad_k = _by_key(layout, M, [g.k for g in of_groups], [g.k_P for g in of_groups])
        grad_v = _by_key(layout, M, [g.v for g in of_groups], [g.v_P for g in of_groups])
        return grad_q, grad_k, grad_v, None, None, None, None


class _Keys(NamedTuple):
    """Keys and values of a group or of a tile, or their gradients: the spans' own (K * B, S, d), shared ones (K, P, d)."""

    k: Tensor
    k_P: Tensor
    v: Tensor
    v_P: Tensor

    def of(self, tile: Tile) -> _Keys:
        return _Keys(self.k[:, tile.keys], self.k_P, self.v[:, tile.keys], self.v_P)


def _of_group(group: Group, k_KMd: Tensor, v_KMd: Tensor) -> _Keys:
    own = (t.index_select(1, group.key_BS.flatten()) for t in (k_KMd, v_KMd))
    k, v = (t.view(-1, group.key_BS.shape[1], t.shape[-1]) for t in own)
    return _Keys(k, k_KMd.index_select(1, group.shared_P), v, v_KMd.index_select(1, group.shared_P))


def _by_key_head(t_HNd: Tensor, K: int) -> Tensor:
    """Queries, or what belongs to them, as (K, G * N, d)."""
    H, N, d = t_HNd.shape
    return t_HNd.reshape(K, H // K * N, d)


def _is_kept(seen: _Keys, softcap: float | None) -> bool:
    return softcap is None and seen.k_P.shape[1] + seen.k.shape[1] <= KEPT_UP_TO


def _weights(tile: Tile, q_KRd: Tensor, seen: _Keys, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Attention weights (K * B, R, T) of queries (K, B * R, d), and the slope of the soft cap at every score."""
    (K, P, d), B = seen.k_P.shape, tile.hidden.shape[0]
    score = q_KRd.view(K * B, -1, d) @ seen.k.transpose(-1, -2)
    if P:
        of_shared = _times(q_KRd, seen.k_P.transpose(-1, -2))
        score = torch.cat([of_shared.reshape(K * B, -1, P), score], -1)
    slope = None
    if softcap is not None:
        capped = torch.tanh(score / softcap)
        score, slope = capped * softcap, 1 - capped.square()
    hidden = tile.hidden[None, :, None]
    by_head = score.view(K, B, -1, hidden.shape[-2], score.shape[-1])
    by_head[..., tile.masked].masked_fill_(hidden, float("-inf"))
    return torch.softmax(score, -1), slope  # in fp32 within, whatever comes in and goes out


def _mixed(weight_BRT: Tensor, seen: _Keys) -> Tensor:
    """The values in these shares: (K, B * R, d)."""
    K, P, _ = seen.k_P.shape
    y = (weight_BRT[..., P:] @ seen.v).view(K, -1, seen.v.shape[-1])
    return y.add_(_times(_shared(weight_BRT, K, P), seen.v_P)) if P else y


def _slopes(g_KRd: Tensor, q_KRd: Tensor, seen: _Keys, weight: Tensor, of_cap: Tensor | None) -> tuple[Tensor, _Keys]:
    """Gradients of the queries (K, B * R, d) and of what they see."""
    K, P, _ = seen.k_P.shape
    g_BRd, q_BRd = (t.view(len(weight), -1, t.shape[-1]) for t in (g_KRd, q_KRd))
    grad_weight = g_BRd @ seen.v.transpose(-1, -2)
    if P:
        of_shared = _times(g_KRd, seen.v_P.transpose(-1, -2))
        grad_weight = torch.cat([of_shared.reshape(*weight.shape[:-1], P), grad_weight], -1)
    slope = torch._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
    if of_cap is not None:
        slope.mul_(of_cap)
    grad_q = (slope[..., P:] @ seen.k).view(q_KRd.shape)
    grad_k, grad_v = slope[..., P:].transpose(-1, -2) @ q_BRd, weight[..., P:].transpose(-1, -2) @ g_BRd
    grad_k_P, grad_v_P = seen.k_P, seen.v_P
    if P:
        shared = _shared(slope, K, P)
        grad_q += _times(shared, seen.k_P)
        grad_k_P, grad_v_P = _summed(shared, q_KRd), _summed(_shared(weight, K, P), g_KRd)
    return grad_q, _Keys(grad_k, grad_k_P, grad_v, grad_v_P)


def _shared(weight_BRT: Tensor, K: int, P: int) -> Tensor:
    """The columns of the shared keys as (K, B * R, P)."""
    return weight_BRT[..., :P].reshape(K, -1, P)


def _times(x_KRa: Tensor, y_Kab: Tensor) -> Tensor:
    """x y, of queries that are as many as they happen to be."""
    return (filled(x_KRa) @ y_Kab)[:, : x_KRa.shape[1]]


def _summed(x_KRa: Tensor, y_KRb: Tensor) -> Tensor:
    """xᵀ y, over these."""
    return filled(x_KRa).transpose(-1, -2) @ filled(y_KRb)


def _added(slopes: Sequence[tuple[slice, _Keys]], S: int) -> _Keys:
    """What the tiles of a group found, by key of the group; of several tiles it is added up in fp32."""
    (_, only), *others = slopes
    if not others and only.k.shape[1] == S:
        return only
    own = (_placed([(keys, getattr(found, name)) for keys, found in slopes], S) for name in ("k", "v"))
    shared = (
        torch.stack([at_least_float32(getattr(found, name)) for _, found in slopes]).sum(0).to(only.k.dtype)
        for name in ("k_P", "v_P")
    )
    (k, v), (k_P, v_P) = own, shared
    return _Keys(k, k_P, v, v_P)


def _placed(parts: Sequence[tuple[slice, Tensor]], S: int) -> Tensor:
    like = parts[0][1]
    total = at_least_float32(like.new_empty(0)).new_zeros(like.shape[0], S, like.shape[-1])
    for keys, part in parts:
        total[:, keys] += part
    return total.to(like.dtype)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _by_key(layout: Layout, M: int, own: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """(K, M, d): what the groups found for their spans' keys and their shared ones, added up in at least fp32."""
    K, _, d = shared[0].shape
    of = layout.own_keys
    found = _joined([part.view(K, -1, d) for part in own]).index_select(1, of.places)
    shares = any(len(group.shared_P) or group.n_copied for group in layout.groups)
    if of.once and len(of.keys) == M and not shares:  # every key is one span's
        return found
    wide = at_least_float32(found)
    total = wide.new_zeros(K, M, d)
    if of.once:  # nothing adds up, and to copy is several times faster
        total.index_copy_(1, of.keys, wide)
    else:
        total.index_add_(1, of.keys, wide)
    for group, part, part_P in zip(layout.groups, own, shared, strict=True):
        if len(group.shared_P):
            total.index_add_(1, group.shared_P, part_P.to(wide.dtype))
        if n := group.n_copied:
            copied = part.view(K, *group.key_BS.shape, d)[:, :, :n]
            total.index_add_(1, group.key_BS[0, :n], copied.sum(1, dtype=wide.dtype))
    return total.to(found.dtype)
