"""Spans with the virtual tokens in their places: what is attended to, and what of it has to be computed.

Segments stand in front of the batch's spans; a span whose text has virtual tokens behind it becomes two, the text and what
follows. Where the number of tokens is to be a round one, rows that nobody reads come last. Knows only spans and lengths.
`layout.py` turns the result into index tensors. Shapes: N packed tokens, P virtual tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tritune.models.base import BARE, Batch, Span

#: length of a segment by slot; key None: one for all rows
Lengths = Mapping[int | None, int]


def text_batch(batch: Batch) -> Batch:
    """The texts alone: spans where a row's text ends (`Span.text`), up to there, and what they see."""
    texts = _texts(batch)
    index = {old: new for new, old in enumerate(texts)}
    spans, tokens = [], []
    at = 0
    for i, length in texts.items():
        span = batch.spans[i]
        spans.append(Span(at, length, tuple(index[p] for p in span.parents), span.text))
        tokens.append(batch.tokens_N[span.start : span.start + length])
        at += length
    return Batch(torch.cat(tokens), tuple(spans))


def _texts(batch: Batch) -> dict[int, int]:
    """Spans that `text_batch` holds -> how many of their tokens."""
    found: dict[int, int] = {}
    for i, span in enumerate(batch.spans):
        if span.text is not None:
            found |= {p: batch.spans[p].length for p in span.parents} | {i: span.text}
    return dict(sorted(found.items()))


@dataclass(slots=True)
class Piece:
    """A span in the making. `source`: runs (start, length) of inputs, counted as in `Layout.source_N`."""

    length: int
    parents: tuple[int, ...]
    slot: int
    source: tuple[tuple[int, int], ...] = ()
    given: bool = False
    end: tuple[int, int] | None = None  # last token of the text before it, and the last virtual one that answers for it


def pieces_of(
    batch: Batch,
    front: Lengths,
    behind: Lengths,
    deep: Lengths,
    deep_behind: Lengths,
    texts_given: bool,
) -> list[Piece]:
    """Segments whose keys are given, those in front, then the batch's spans, each behind its own slot's segment. A span whose
    text has virtual tokens behind it becomes two: the text, and what follows, which sees the keys behind the text too."""
    _check_slots(batch, front, behind, deep, deep_behind)
    pieces: list[Piece] = []
    first: dict[int | None, int] = {}
    keys_behind: dict[int | None, int] = {}
    at = 0
    for place, lengths in ((first, deep), (keys_behind, deep_behind)):
        for slot, length in lengths.items():
            place[slot] = len(pieces)
            pieces.append(Piece(length, (), _number(slot), given=True))
    for slot, length in front.items():
        first[slot] = len(pieces)
        pieces.append(Piece(length, (), _number(slot), ((at, length),)))
        at += length
    given = _texts(batch) if texts_given else {}
    next_behind = _starts_behind(batch, behind, at + len(batch.tokens_N))
    became: list[tuple[int, ...]] = []
    for i, span in enumerate(batch.spans):
        own = None if batch.slots is None else batch.slots[i]
        parents = (*_of(own, first), *(q for p in span.parents for q in became[p]))
        key = own if own in behind else None
        P = behind.get(key, 0)
        start = at + span.start
        became.append((len(pieces),))
        if span.text is None or not (P or texts_given):
            pieces.append(Piece(span.length, parents, _number(own), ((start, span.length),), i in given))
            continue
        pieces.append(Piece(span.text, parents, _number(own), ((start, span.text),), i in given))
        runs = ((next_behind.get(key, 0), P), (start + span.text, span.length - span.text))
        follows = tuple((run, n) for run, n in runs if n)
        if follows:
            end = (span.start + span.text - 1, runs[0][0] + P - 1) if P else None
            text = (len(pieces) - 1, *_of(own, keys_behind))
            became[-1] = (*text, len(pieces))
            pieces.append(Piece(sum(n for _, n in follows), (*parents, *text), _number(own), follows, end=end))
        if P:
            next_behind[key] += P
    return pieces


def _of(slot: int | None, places: Mapping[int | None, int]) -> tuple[int, ...]:
    """Where a slot's segment is, or every row's."""
    place = places.get(slot, places.get(None))
    return () if place is None else (place,)


def filling(pieces: Sequence[Piece], n: int, start: int) -> list[Piece]:
    """Rows of n tokens in all that nobody reads, of the bare base. `start`: where their inputs begin.

    They are no longer than the last row and see what the last two both see, so that they are attended to with others."""
    computed = [piece for piece in pieces if not piece.given]
    last, before = computed[-1], computed[-2:][0]
    seen = tuple(a for a, b in zip(last.parents, before.parents, strict=False) if a == b)
    rows = -(-n // last.length)
    ends = [n * i // rows for i in range(rows + 1)]
    return [Piece(end - begin, seen, BARE, ((start + begin, end - begin),)) for begin, end in pairwise(ends)]


def _check_slots(batch: Batch, *kinds: Lengths) -> None:
    """No segment may go unseen by the rows it is meant for."""
    front, behind, deep, deep_behind = kinds
    every = set().union(*kinds)
    if every - {None}:
        assert batch.slots is not None, "segments of slots need a batch with slots: its rows would see none of them"
        assert None not in every, "a segment for every row beside segments of slots: which comes first is not said"
    assert not set(front) & set(deep), "two segments in front for one slot"
    assert set(deep_behind) <= set(behind), "keys and values behind texts, and no virtual token there to see them"
    _check_texts(batch, behind)


def _check_texts(batch: Batch, behind: Lengths) -> None:
    """From its first span to its last, a row that has virtual tokens behind its text says once where that is."""
    spans = batch.spans
    inner = {p for span in spans for p in span.parents}
    for i, span in enumerate(spans):
        own = None if batch.slots is None else batch.slots[i]
        if i in inner or not (own in behind or None in behind):
            continue
        marked = [spans[j] for j in (*span.parents, i) if spans[j].text is not None]
        assert marked, "a segment behind texts, and no span says where its text ends"
        assert len(marked) == 1, "a row's text ends twice"
        assert 0 < (marked[0].text or 0) <= marked[0].length, "a text ends inside its span"


def rows_behind(batch: Batch, behind: Lengths) -> dict[int | None, int]:
    """How many texts of each slot have its segment behind them."""
    slots = [None] * len(batch.spans) if batch.slots is None else batch.slots
    marked = [own for span, own in zip(batch.spans, slots, strict=True) if span.text is not None]
    return {slot: len(marked) if slot is None else marked.count(slot) for slot in behind}


def _starts_behind(batch: Batch, behind: Lengths, at: int) -> dict[int | None, int]:
    starts: dict[int | None, int] = {}
    for slot, rows in rows_behind(batch, behind).items():
        starts[slot] = at
        at += rows * behind[slot]
    return starts


def _number(slot: int | None) -> int:
    return -1 if slot is None else slot


def in_key_order(pieces: Sequence[Piece]) -> list[Span]:
    """Where each piece's keys lie: the given ones first."""
    spans: list[Span] = []
    at, given_at = sum(piece.length for piece in pieces if piece.given), 0
    for piece in pieces:
        spans.append(Span(given_at if piece.given else at, piece.length, piece.parents))
        given_at, at = (given_at + piece.length, at) if piece.given else (given_at, at + piece.length)
    return spans


def asked_of(batch: Batch, pieces: Sequence[Piece], source_N: Tensor, n_front: int) -> Tensor:
    ends = [piece.end for piece in pieces if piece.end is not None]
    size = 1 + max(int(source_N.max()), n_front + len(batch.tokens_N) - 1)
    packed = torch.full((size,), -1).index_copy(0, source_N, torch.arange(len(source_N)))
    asked = packed[n_front : n_front + len(batch.tokens_N)].clone()
    if ends:
        token, virtual = torch.tensor(ends).T
        asked[token] = packed[virtual]
    return asked
