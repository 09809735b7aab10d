"""The one attention function: every row sees its own past and the segments it declares, nothing else.

Registered with transformers' AttentionInterface under NAME; the layout arrives as the keyword argument `layout`.
No mask function is registered under that name, so transformers builds no mask. What a model hands over is honoured
(scaling, sliding window, soft cap) or refused; ignoring it would be a silently wrong model.
Shapes: N packed tokens, B spans, L queries of a span, P shared keys, S other keys, T = P + S, H query heads, K key heads,
R = L * H / K queries that meet one key head, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from tritune.errors import UnsupportedBase
from tritune.models import varlen
from tritune.models.dtype import at_least_float32
from tritune.models.layout import Group, Layout
from tritune.models.short_rows import ShortRows

NAME = "tritune_packed"

#: from this many scores per span and head on, the fused kernel that never stores them beats the plain product
FUSED_FROM = 384 * 384


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    layout: Layout | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over packed rows.

    Args:
        query, key, value: (1, H, N, d), (1, K, N, d), (1, K, N, d), positions already applied.
        layout: who sees whom.

    Returns:
        (1, N, H, d), and no attention weights.

    Raises:
        UnsupportedBase: the model asks for something this function does not do.
    """
    if layout is None:
        raise UnsupportedBase(
            "This model does not hand the batch's layout to its attention function; it cannot be packed."
        )
    refused = {"attention sinks": s_aux is not None, "a mask": attention_mask is not None, "dropout": dropout > 0.0}
    if any(refused.values()):
        asked = ", ".join(name for name, given in refused.items() if given)
        raise UnsupportedBase(f"This model's attention uses {asked}, which packed rows do not support.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q_NHd, k_NKd, v_NKd = (t[0].transpose(0, 1) for t in (query, key, value))
    if layout.past is not None:
        k_NKd, v_NKd = layout.past.joined(module.layer_idx, k_NKd, v_NKd)  # type: ignore[arg-type]  # an int
    if layout.rows is not None and varlen.runs_here(query, softcap):
        return varlen.attend(layout.rows, q_NHd, k_NKd, v_NKd, scale, sliding_window)[None], None
    if softcap is None and not any(_is_long(group) for group in layout.groups):
        k_KNd, v_KNd = k_NKd.transpose(0, 1), v_NKd.transpose(0, 1)
        y_HNd: Tensor = ShortRows.apply(query[0], k_KNd, v_KNd, layout, scale, sliding_window)  # type: ignore[no-untyped-call]
        return y_HNd.transpose(0, 1)[None], None
    outputs = []
    for group in layout.groups:
        y_BLHd = _attend(group, q_NHd, k_NKd, v_NKd, scale, sliding_window, softcap)
        flat = y_BLHd.flatten(0, 1)
        outputs.append(flat if group.kept is None else flat.index_select(0, group.kept))
    y_NHd = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).index_select(0, layout.back_N)
    return y_NHd[None], None


def _is_long(group: Group) -> bool:
    (_, L), T = group.query_BL.shape, group.key_position_BT.shape[1]
    return L * T >= FUSED_FROM


def _attend(
    group: Group, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """(B, L, H, d) for one group, all heads."""
    (B, L), S = group.query_BL.shape, group.key_BS.shape[1]
    H, K, d = q_NHd.shape[1], k_NKd.shape[1], q_NHd.shape[2]
    q_BLHd = q_NHd.index_select(0, group.query_BL.flatten()).view(B, L, H, d)
    k_KBSd, v_KBSd = (
        t.index_select(0, group.key_BS.flatten()).view(B, S, K, t.shape[-1]).permute(2, 0, 1, 3) for t in (k_NKd, v_NKd)
    )
    k_KPd, v_KPd = (t.index_select(0, group.shared_P).transpose(0, 1) for t in (k_NKd, v_NKd))
    if _is_long(group) and softcap is None:
        keys, values = (
            torch.cat([shared[:, None].expand(-1, B, -1, -1), own], 2).transpose(0, 1)
            for shared, own in ((k_KPd, k_KBSd), (v_KPd, v_KBSd))
        )
        # Without a mask the kernel leaves out what lies ahead, and its backward needs no mask either.
        whole = group.causal and not len(group.shared_P) and (window is None or window >= S)
        y_BHLd = F.scaled_dot_product_attention(
            q_BLHd.transpose(1, 2),
            keys,
            values,
            attn_mask=None if whole else ~group.hidden(window)[:, None],
            is_causal=whole,
            scale=scale,
            enable_gqa=K != H,
        )
        return y_BHLd.transpose(1, 2)
    hidden_BLT = group.hidden(window)
    # Query heads that share a key head are folded into the rows of one product, and all spans into one product with the
    # shared keys: no key or value is copied for either.
    R = H // K * L
    q_KBRd = (q_BLHd.view(B, L, K, H // K, d).permute(2, 0, 3, 1, 4) * scale).reshape(K, B, R, d).contiguous()
    score_KBRT = q_KBRd @ k_KBSd.transpose(-1, -2)
    P = len(group.shared_P)
    if P:
        shared_KBRP = (q_KBRd.view(K, B * R, d) @ k_KPd.transpose(-1, -2)).view(K, B, R, P)
        score_KBRT = torch.cat([shared_KBRP, score_KBRT], -1)
    if softcap is not None:
        score_KBRT = softcap * torch.tanh(score_KBRT / softcap)
    score = score_KBRT.view(K, B, H // K, L, P + S).masked_fill(hidden_BLT[None, :, None], float("-inf"))
    weight_KBRT = torch.softmax(at_least_float32(score), dim=-1).to(q_NHd.dtype).view(K, B, R, P + S)
    y_KBRd = weight_KBRT[..., P:] @ v_KBSd
    if P:
        y_KBRd = y_KBRd + (weight_KBRT[..., :P].reshape(K, B * R, P) @ v_KPd).view(y_KBRd.shape)
    return y_KBRd.view(K, B, H // K, L, v_NKd.shape[-1]).permute(1, 3, 0, 2, 4).reshape(B, L, H, v_NKd.shape[-1])


AttentionInterface.register(NAME, packed_attention)
