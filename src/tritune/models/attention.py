"""The one attention function: every row sees its own past and the segments it declares, nothing else.

Registered with transformers' AttentionInterface under NAME; the layout arrives as the keyword argument `layout`.
No mask function is registered under that name, so transformers builds no mask. What a model hands over is honoured
(scaling, sliding window, soft cap) or refused; ignoring it would be a silently wrong model.
Shapes: N packed tokens, M keys, H query heads, K key heads, d head width.
"""

from __future__ import annotations

from torch import Tensor, nn

from tritune.errors import UnsupportedBase
from tritune.models import varlen
from tritune.models.layout import Layout
from tritune.models.library import AttentionInterface
from tritune.models.tiles import Tiles

NAME = "tritune_packed"


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
    q_NHd, k_MKd, v_MKd = (t[0].transpose(0, 1) for t in (query, key, value))
    if layout.past is not None:
        k_MKd, v_MKd = layout.past.joined(module.layer_idx, k_MKd, v_MKd)  # type: ignore[arg-type]  # an int
    if layout.rows is not None and varlen.runs_here(query, softcap):
        return varlen.attend(layout.rows, q_NHd, k_MKd, v_MKd, scale, sliding_window)[None], None
    assert layout.groups, "laid out for the kernel of a GPU alone, which does not take these queries"
    k_KMd, v_KMd = k_MKd.transpose(0, 1), v_MKd.transpose(0, 1)
    y_HNd: Tensor = Tiles.apply(query[0], k_KMd, v_KMd, layout, scale, sliding_window, softcap)  # type: ignore[no-untyped-call]
    return y_HNd.transpose(0, 1)[None], None


AttentionInterface.register(NAME, packed_attention)
