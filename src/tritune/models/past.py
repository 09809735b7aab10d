"""Keys and values that a forward pass finds ready, per layer: learned ones (deep prompts), or those of a text that does not
depend on anything learned.

`attention.py` asks for them by layer and puts them in front of its own; `layout.py` counts them first. Knows no model and
no method. Shapes: n layers, M given keys, N packed tokens, P virtual tokens, K key heads, d head width, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tritune.models.base import DeepSegment, Edits, Segment

if TYPE_CHECKING:
    from tritune.models.layout import Layout


class Past(Protocol):
    """What one forward pass has in front of its own keys and values."""

    def joined(self, layer: int, k_NKd: Tensor, v_NKd: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (M + N, K, d) of a layer."""
        ...


class Given:
    """The keys and values themselves, one behind the other: each (n, 2, M, K, d)."""

    def __init__(self, *given_n2MKd: Tensor) -> None:
        self._given = tuple(layers.unbind(0) for layers in given_n2MKd)

    def joined(self, layer: int, k_NKd: Tensor, v_NKd: Tensor) -> tuple[Tensor, Tensor]:
        given = [layers[layer].to(k_NKd.dtype) for layers in self._given]
        return torch.cat([*(kv[0] for kv in given), k_NKd]), torch.cat([*(kv[1] for kv in given), v_NKd])


class Recorded:
    """Nothing in front; what comes by is kept."""

    def __init__(self) -> None:
        self._layers: dict[int, Tensor] = {}

    def joined(self, layer: int, k_NKd: Tensor, v_NKd: Tensor) -> tuple[Tensor, Tensor]:
        self._layers[layer] = torch.stack([k_NKd, v_NKd])
        return k_NKd, v_NKd

    def layers_n2NKd(self) -> Tensor:
        return torch.stack([self._layers[i] for i in range(len(self._layers))])


class Virtual:
    """The segments of a forward pass by kind, in the order that `layout.build` counts them."""

    def __init__(self, segments: Sequence[Segment | DeepSegment]) -> None:
        shallow = [s for s in segments if isinstance(s, Segment)]
        self._front = {s.slot: s.embeddings_PD for s in shallow if not s.behind}
        self._behind = {s.slot: s.embeddings_PD for s in shallow if s.behind}
        deep = [s for s in segments if isinstance(s, DeepSegment)]
        self._deep = {s.slot: s.layers_n2PKd for s in deep if not s.behind}
        self._deep_behind = {s.slot: s.layers_n2PKd for s in deep if s.behind}
        count = len(self._front) + len(self._behind) + len(self._deep) + len(self._deep_behind)
        assert count == len(segments), "two segments for one slot at one place"

    @property
    def front(self) -> dict[int | None, int]:
        return {slot: x_PD.shape[0] for slot, x_PD in self._front.items()}

    @property
    def behind(self) -> dict[int | None, int]:
        return {slot: x_PD.shape[0] for slot, x_PD in self._behind.items()}

    @property
    def deep(self) -> dict[int | None, int]:
        return {slot: layers.shape[2] for slot, layers in self._deep.items()}

    @property
    def deep_behind(self) -> dict[int | None, int]:
        return {slot: layers.shape[2] for slot, layers in self._deep_behind.items()}

    @property
    def lengths(self) -> dict[str, Any]:
        """All of them, as `layout.build` takes them: by slot, one for each kind."""
        return {"front": self.front, "behind": self.behind, "deep": self.deep, "deep_behind": self.deep_behind}

    @property
    def none(self) -> bool:
        """Whether there are no segments at all."""
        return not (self._front or self._behind or self._deep or self._deep_behind)

    def texts_stand(self, edits: Edits) -> bool:
        """Whether the rows' texts depend on nothing that is learned: these segments, which are those of `edits`, stand behind
        them, and nothing else acts."""
        only_behind = bool(self._behind) and not self._front and not self._deep
        return only_behind and not edits.sites() and not edits.weights()

    def inputs(self, x_ND: Tensor, layout: Layout) -> Tensor:
        """What goes into the first layer, in packed order, from the embeddings of a batch's own tokens."""
        behind = [
            # Repeated before the cast: a row's gradients are then summed in the segment's own format.
            self._behind[slot].expand(rows, -1, -1).flatten(0, 1).to(x_ND.dtype)
            for slot, rows in layout.rows_behind.items()
        ]
        inputs_ND = torch.cat([*(x_PD.to(x_ND.dtype) for x_PD in self._front.values()), x_ND, *behind])
        inputs_ND = layout.filled_up(inputs_ND)
        return inputs_ND if layout.source_N is None else inputs_ND.index_select(0, layout.source_N)

    def past(self, texts_n2MKd: Tensor | None = None) -> Past | None:
        """Deep segments, then given texts; None: there are neither."""
        given = [*self._deep.values(), *self._deep_behind.values(), *([] if texts_n2MKd is None else [texts_n2MKd])]
        return Given(*given) if given else None
