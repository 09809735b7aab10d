"""Where every packed token sits and what it may attend to, as index tensors. Built once per batch, used by all layers.

Knows no model: only spans and lengths. `attention.py` reads the result; `pieces.py` puts virtual tokens in their places.
Shapes: N packed tokens (those of segments in front first), M keys (given ones, then packed ones), B spans of a group, L
longest span of a group, P shared keys that its spans meet in products of their own (or virtual tokens of a segment), S
longest list of a span's other keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from operator import attrgetter
from types import MappingProxyType

import torch
from torch import Tensor

from tritune.models.base import BARE, Batch, Span
from tritune.models.group import NEVER, Group
from tritune.models.past import Past
from tritune.models.pieces import Lengths, Piece, asked_of, filling, in_key_order, pieces_of, rows_behind
from tritune.models.round_numbers import missing
from tritune.models.varlen import Rows, rows_of

#: spans are grouped as long as none is padded by more than this many tokens or this share of its length
SLACK_TOKENS, SLACK_SHARE = 12, 0.34
#: so many keys that all spans of a group share are copied for each: products of their own would cost more calls than that
FEW = 64


@dataclass(frozen=True)
class Layout:
    """Tokens are computed in packed order; keys that are given (`past`) come before all packed ones in the groups' indexes.

    `positions_N` counts from the first token a row can see. `back_N` puts the groups' outputs in packed order.
    `slot_N` is each token's slot, and `runs` where the tokens of each slot lie; nothing where the batch has no slots.
    `source_N`: what stands at each packed position, as an index into: the tokens of the segments in front, of the batch,
    and of the segments behind texts, once per row of `rows_behind`. None: just these, in this order.
    `asked`: for each token of the batch, the packed position whose output says what follows it: its own or, at the end of
    a text, that of the last virtual token behind it; -1 where neither is computed.
    """

    positions_N: Tensor
    groups: tuple[Group, ...]
    back_N: Tensor
    slot_N: Tensor | None
    runs: Mapping[int, tuple[slice, ...]]
    source_N: Tensor | None
    rows_behind: Lengths
    asked: Tensor
    rows: Rows | None = None  # for the kernel of a GPU
    n_filling: int = 0  # so many of the last tokens nobody reads
    past: Past | None = None
    places: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def filled_up(self, x_ND: Tensor) -> Tensor:
        """With something in the place of the tokens that nobody reads."""
        return torch.cat([x_ND, x_ND.new_zeros(self.n_filling, x_ND.shape[1])]) if self.n_filling else x_ND

    def unfolded(self, heads: int, n: int) -> Tensor:
        """Where each of heads * n queries stands among what the groups, one behind the other, fold (`Group.folded`)."""
        if (heads, n) not in self.places:
            place = self.back_N.new_empty(heads * n)
            at = 0
            for folded in (tile for group in self.groups for tile in group.folded(heads, n)):
                real = torch.ones_like(folded.index, dtype=torch.bool)
                if folded.padding is not None:
                    real[folded.padding] = False
                place[folded.index[real]] = at + real.nonzero()[:, 0]
                at += len(folded.index)
            self.places[heads, n] = place
        return self.places[heads, n]

    def runs_among(self, at_R: Tensor) -> dict[int, tuple[slice, ...]]:
        """Where the tokens of each slot lie among some of the packed ones, in their order, where it has any."""
        found = {}
        for slot, runs in self.runs.items():
            ends = [torch.searchsorted(at_R, torch.tensor([run.start, run.stop])).tolist() for run in runs]
            found[slot] = tuple(slice(start, stop) for start, stop in ends if start < stop)
        return {slot: runs for slot, runs in found.items() if runs}

    @cached_property
    def own_keys(self) -> OwnKeys:
        """Keys that spans have for themselves, if perhaps with some others; not what a whole group has in common."""
        keys, own = (
            torch.cat([of(group).flatten() for group in self.groups])
            for of in (attrgetter("key_BS"), attrgetter("own_BS"))
        )
        places = own.nonzero()[:, 0]
        found, order = keys[places].sort()
        return OwnKeys(found, places[order], once=len(torch.unique(found)) == len(found))


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """Keys in their order, where each stands among the groups' `key_BS`, one behind the other, and whether none is in there
    for two spans."""

    keys: Tensor
    places: Tensor
    once: bool


def build(
    batch: Batch,
    front: Lengths = MappingProxyType({}),
    device: torch.device = torch.device("cpu"),
    *,
    behind: Lengths = MappingProxyType({}),
    deep: Lengths = MappingProxyType({}),
    deep_behind: Lengths = MappingProxyType({}),
    texts_given: bool = False,
    round_number: bool = False,
    varlen: bool | None = None,
    grouped: bool = True,
) -> Layout:
    """Lay out a batch with its virtual tokens. Segments' lengths are given by slot; key None: one for all rows.

    Args:
        front: segments in front of rows, in the order they are packed.
        behind: segments behind every text.
        deep, deep_behind: segments whose keys and values are given, in front of rows and behind texts. They come first in
            the past, in this order.
        texts_given: keys and values of the rows' texts are given too, those of `text_batch(batch)` in that order.
        round_number: compute a round number of tokens, the last of which may be nobody's (`round_numbers.py`).
        varlen: also as the kernel of a GPU wants it; None: where there is one.
        grouped: False: as that kernel wants it alone.
    """
    pieces = pieces_of(batch, front, behind, deep, deep_behind, texts_given)
    n_front = sum(front.values())
    n_behind = sum(rows * behind[slot] for slot, rows in rows_behind(batch, behind).items())
    n_filling = missing(sum(piece.length for piece in pieces if not piece.given)) if round_number else 0
    if n_filling:
        pieces += filling(pieces, n_filling, n_front + len(batch.tokens_N) + n_behind)
    spans = in_key_order(pieces)
    n_given = sum(piece.length for piece in pieces if piece.given)
    past = [sum(spans[p].length for p in span.parents) for span in spans]
    computed = [i for i, piece in enumerate(pieces) if not piece.given]
    positions = torch.cat(
        [
            torch.arange(past[i], past[i] + spans[i].length)
            for i in sorted(range(len(spans)), key=lambda i: spans[i].start)
        ]
    )
    groups, order = [], [torch.empty(0, dtype=torch.long)]
    for members in _grouped(spans, past, computed) if grouped else ():
        group = _group(spans, members, positions, n_given)
        groups.append(group.to(device))
        queries = group.query_BL.flatten()
        order.append(queries if group.kept is None else queries[group.kept])
    slot_N = None
    if batch.slots is not None:
        slot_N = torch.cat([torch.full((pieces[i].length,), pieces[i].slot) for i in computed]).to(device)
    source_N, asked = None, torch.arange(len(batch.tokens_N)) + n_front
    if behind or texts_given:
        source_N = torch.cat([torch.arange(start, start + n) for i in computed for start, n in pieces[i].source])
        asked = asked_of(batch, pieces, source_N, n_front)
    return Layout(
        positions_N=positions[n_given:].to(device),
        groups=tuple(groups),
        back_N=torch.argsort(torch.cat(order)).to(device),
        slot_N=slot_N,
        runs={} if batch.slots is None else _runs([pieces[i] for i in computed]),
        source_N=None if source_N is None else source_N.to(device),
        rows_behind=rows_behind(batch, behind),
        asked=asked,
        rows=rows_of(spans, computed, device) if (device.type == "cuda" if varlen is None else varlen) else None,
        n_filling=n_filling,
    )


def _runs(computed: Sequence[Piece]) -> dict[int, tuple[slice, ...]]:
    """Consecutive tokens of each adaptation; the bare base's are nobody's."""
    found: dict[int, tuple[slice, ...]] = {}
    at = 0
    for slot, members in groupby(computed, key=lambda piece: piece.slot):
        end = at + sum(piece.length for piece in members)
        if slot != BARE:
            found[slot] = (*found.get(slot, ()), slice(at, end))
        at = end
    return found


def _grouped(spans: Sequence[Span], past: Sequence[int], computed: Sequence[int]) -> list[list[int]]:
    """Spans of similar length and similar past together; few groups, little padding."""
    groups: list[_Members] = []
    for i in sorted(computed, key=lambda i: (spans[i].length, past[i])):
        fitting = next((group for group in reversed(groups) if group.takes(spans[i].length, past[i])), None)
        if fitting is None:
            fitting = _Members(spans[i].length, past[i], past[i])
            groups.append(fitting)
        fitting.add(i, past[i])
    return [group.indexes for group in groups]


@dataclass(slots=True)
class _Members:
    """A group in the making. Spans come in the order of their lengths, so `shortest` is the first one's."""

    shortest: int
    least: int
    most: int
    indexes: list[int] = field(default_factory=list)

    def takes(self, length: int, past: int) -> bool:
        least, most = min(self.least, past), max(self.most, past)
        return _close(self.shortest, length) and _close(self.shortest + least, self.shortest + most)

    def add(self, index: int, past: int) -> None:
        self.least, self.most = min(self.least, past), max(self.most, past)
        self.indexes.append(index)


def _close(short: int, long: int) -> bool:
    return long - short <= max(SLACK_TOKENS, int(SLACK_SHARE * short))


def _group(spans: Sequence[Span], members: Sequence[int], positions_M: Tensor, n_given: int) -> Group:
    """`positions_M` of all tokens, given ones first. What all members see comes first among their keys, wherever it is."""
    L = max(spans[i].length for i in members)
    common = _common([spans[i].parents for i in members])
    shared_P = _tokens(spans, common)
    n_copied = len(shared_P) if len(shared_P) <= FEW else 0
    n_shared = 0 if n_copied else len(shared_P)
    lines = [(*common, *(p for p in spans[i].parents if p not in common), i) for i in members]
    keys = [_tokens(spans, line) for line in lines]
    T = max(map(len, keys))
    query_BL = torch.stack([_ramp(spans[i], L) for i in members])
    key_BT = torch.zeros(len(members), T, dtype=torch.long)
    key_position_BT = torch.full((len(members), T), NEVER)
    for row, (i, line, index) in enumerate(zip(members, lines, keys, strict=True)):
        key_BT[row, : len(index)] = index
        key_position_BT[row, : len(index)] = _positions(spans, i, line)
    key_BS, shared_P = key_BT[:, n_shared:], shared_P[:n_shared]
    real = torch.stack([torch.arange(L) < spans[i].length for i in members])
    kept = None if bool(real.all()) else real.flatten().nonzero()[:, 0]
    return Group(query_BL - n_given, shared_P, key_BS, positions_M[query_BL], key_position_BT, kept, n_copied)


def _common(parents: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all see, in the order of the first."""
    every = set(parents[0]).intersection(*parents[1:])
    return tuple(p for p in parents[0] if p in every)


def _positions(spans: Sequence[Span], i: int, line: Sequence[int]) -> Tensor:
    """Where the tokens of what a span sees, and its own, stand in its row; of spans in the order of `line`."""
    seen = (*spans[i].parents, i)
    first = dict(zip(seen, accumulate((spans[p].length for p in seen), initial=0), strict=False))
    return torch.cat([torch.arange(first[p], first[p] + spans[p].length) for p in line])


def _tokens(spans: Sequence[Span], indexes: Sequence[int]) -> Tensor:
    """Packed positions of all tokens of these spans, in order."""
    ranges = [torch.arange(spans[i].start, spans[i].start + spans[i].length) for i in indexes]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.long)


def _ramp(span: Span, L: int) -> Tensor:
    return span.start + torch.arange(L).clamp(max=span.length - 1)
