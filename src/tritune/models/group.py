"""Spans of similar size side by side, and the tiles in which they are attended: a number of queries of every span, and the
keys that any of these may see.

Knows positions and who sees whom; no layer, no model. `layout.py` makes groups, `tiles.py` computes with them.
Shapes: B spans of a group, L its longest span, P shared keys that its spans meet in products of their own, S longest list of
a span's other keys, T = P + S; l queries of a tile and s of its other keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

#: the position of a key that is padding: ahead of every query
NEVER = torch.iinfo(torch.long).max // 2
#: queries of a tile: of spans up to LONG tokens, and of longer ones, where larger products are worth more than fewer scores
QUERIES, QUERIES_OF_LONG, LONG = 64, 128, 768


@dataclass(frozen=True, slots=True)
class Tile:
    """Some queries of all spans of a group, and what they may see.

    Attributes:
        queries: which of the L.
        keys: which of the S; the P are seen besides.
        masked: where in (P + s) keys begin and end of which some query may not see some; the whole tile sees the others.
        hidden: (B, l, masked) true where a query may not see a key.
    """

    queries: slice
    keys: slice
    masked: slice
    hidden: Tensor


@dataclass(frozen=True)
class Group:
    """Spans of similar size, to be attended in batched products.

    Keys of parents that all members have in common stand in `shared_P` once or, if they are few, as the first `n_copied` of
    every span's own. Padding repeats a span's last token as query and is masked as key; `kept` says which of the B * L
    queries are real.
    """

    query_BL: Tensor
    shared_P: Tensor
    key_BS: Tensor
    query_position_BL: Tensor
    key_position_BT: Tensor  # shared keys, then the others; beyond every query where a key is padding
    kept: Tensor | None  # None: no padding
    n_copied: int = 0
    _tiles: dict[int | None, tuple[Tile, ...]] = field(default_factory=dict, init=False)
    _folded: dict[tuple[int, int], list[Folded]] = field(default_factory=dict, init=False)

    def to(self, device: torch.device) -> Group:
        return Group(
            self.query_BL.to(device),
            self.shared_P.to(device),
            self.key_BS.to(device),
            self.query_position_BL.to(device),
            self.key_position_BT.to(device),
            None if self.kept is None else self.kept.to(device),
            self.n_copied,
        )

    @property
    def cuts(self) -> list[slice]:
        """The queries of each tile. The last has half as many as the others at least, or up to half as many more: equal
        sizes make equal products, of which a library keeps what it prepared."""
        L = self.query_BL.shape[1]
        size = QUERIES if L <= LONG else QUERIES_OF_LONG
        starts = list(range(0, max(L - size // 2, 1), size))
        return [slice(start, end) for start, end in pairwise([*starts, L])]

    def tiles(self, window: int | None) -> tuple[Tile, ...]:
        """With a window, keys that many or more behind a query are hidden from it."""
        if window not in self._tiles:
            self._tiles[window] = tuple(self._tile(queries, window) for queries in self.cuts)
        return self._tiles[window]

    def _tile(self, queries: slice, window: int | None) -> Tile:
        hidden_BlT = self.hidden(window, queries)
        P = len(self.shared_P)
        keys = _extent(~hidden_BlT[..., P:])
        hidden = torch.cat([hidden_BlT[..., :P], hidden_BlT[..., P:][..., keys]], -1)
        masked = _extent(hidden)
        return Tile(queries, keys, masked, hidden[..., masked].contiguous())

    def hidden(self, window: int | None, queries: slice = slice(None)) -> Tensor:
        """(B, l, T) true where a query may not see a key: ahead of it or, with a window, `window` or more behind."""
        distance = self.query_position_BL[:, queries, None] - self.key_position_BT[:, None, :]
        ahead = distance < 0
        return ahead if window is None else ahead | (distance >= window)

    def folded(self, heads: int, n: int) -> list[Folded]:
        """For each tile, where its queries of `heads` heads stand in (heads * n, d), head by head."""
        if (heads, n) not in self._folded:
            first_h = torch.arange(heads, device=self.query_BL.device) * n
            self._folded[heads, n] = [
                Folded((first_h[None, :, None] + self.query_BL[:, None, cut]).flatten(), self._padding(heads, cut))
                for cut in self.cuts
            ]
        return self._folded[heads, n]

    def _padding(self, heads: int, cut: slice) -> Tensor | None:
        if self._real_BL is None:
            return None
        padding_Bl = ~self._real_BL[:, cut]
        found = padding_Bl[:, None].expand(-1, heads, -1).flatten().nonzero()[:, 0]
        return found if len(found) else None

    @cached_property
    def _real_BL(self) -> Tensor | None:
        if self.kept is None:
            return None
        real = torch.zeros(self.query_BL.numel(), dtype=torch.bool, device=self.kept.device)
        return real.index_fill(0, self.kept, True).view(self.query_BL.shape)

    @property
    def own_BS(self) -> Tensor:
        """Which of `key_BS` are no padding, and not what all spans have in common."""
        own = self.key_position_BT[:, len(self.shared_P) :] < NEVER
        own[:, : self.n_copied] = False
        return own


@dataclass(frozen=True, slots=True)
class Folded:
    """Queries of a tile: (B * heads * l) where they stand, and which entries of that are padding (None: none)."""

    index: Tensor
    padding: Tensor | None


def _extent(wanted_Blt: Tensor) -> slice:
    """From the first to the last key that is wanted by any query."""
    found = wanted_Blt.flatten(0, 1).any(0).nonzero()[:, 0]
    return slice(int(found[0]), int(found[-1]) + 1) if len(found) else slice(0, 0)
