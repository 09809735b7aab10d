"""Rows -> packed batches: for training (labels at the answer) and for scoring (every possible answer of every row).

What all rows of a batch begin with (an instruction, solved examples) becomes one shared span and is computed once; so
does a row's context when several answers are scored behind it. Exact, not an approximation. Knows ids, no text, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from tritune.models.base import BARE, IGNORE, Batch, Span
from tritune.text.encode import Encoded

#: sharing a beginning costs a group of its own in attention; from this many saved tokens on it pays
WORTH_SHARING = 32
#: most positions whose logits are held at once while scoring (a vocabulary of 50,000 in fp32: 0.2 MB each)
MOST_SCORED = 512


class _Builder:
    """Spans and tokens in the making."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.spans: list[Span] = []

    def add(self, ids: Sequence[int], parents: tuple[int, ...], text: int | None = None) -> int:
        """Append a span; returns its index. `text`: after so many of its tokens the row's text ends."""
        self.spans.append(Span(len(self.tokens), len(ids), parents, text))
        self.tokens.extend(ids)
        return len(self.spans) - 1

    def end(self, span: int) -> int:
        return self.spans[span].start + self.spans[span].length - 1


def shared_beginning(rows: Sequence[tuple[int, ...]]) -> int:
    """How many first ids all rows have in common and may share; each keeps at least one of its own."""
    first, last = min(rows), max(rows)
    most = min(len(first), len(last), min(map(len, rows)) - 1)
    n = next((i for i in range(most) if first[i] != last[i]), most)
    return n if n * (len(rows) - 1) >= WORTH_SHARING else 0


def training_batch(rows: Sequence[Encoded], slots: Sequence[int] | None = None) -> Batch:
    """Loss is taken on every token of each answer, at the position that predicts it. `slots`: the adaptation of each row;
    those of one adaptation that follow each other share their beginning."""
    build = _Builder()
    labels: list[int] = []
    span_slots: list[int] = []
    for slot, group in groupby(zip(slots or [BARE] * len(rows), rows, strict=True), key=lambda pair: pair[0]):
        labels += _learned(build, [row for _, row in group])
        span_slots += [slot] * (len(build.spans) - len(span_slots))
    given = None if slots is None else tuple(span_slots)
    return Batch(torch.tensor(build.tokens), tuple(build.spans), torch.tensor(labels), given)


def _learned(build: _Builder, rows: Sequence[Encoded]) -> list[int]:
    """Add rows that share what all begin with; returns their labels."""
    n = shared_beginning([row.context for row in rows])
    parents = (build.add(rows[0].context[:n], ()),) if n else ()
    labels = [IGNORE] * n
    for row in rows:
        assert row.target, f"row {row.id} has no answer to learn"
        own = row.context[n:]
        build.add((*own, *row.target[:-1]), parents, len(own))
        labels += [IGNORE] * (len(own) - 1) + list(row.target)
    return labels


def _shared(rows: Sequence[Encoded], slots: Sequence[int] | None) -> int:
    """How much of their beginning rows share: nothing across adaptations."""
    return shared_beginning([row.context for row in rows]) if slots is None or len(set(slots)) == 1 else 0


@dataclass(frozen=True, slots=True)
class ScoringBatch:
    """A batch and how to read it: score k is the log-probability of `token_K[k]` at `at_K[k]`, and adds to a
    (row, choice) pair: `owner_K[k]` counts through the rows' choices in order."""

    batch: Batch
    at_K: Tensor
    token_K: Tensor
    owner_K: Tensor
    choices: tuple[int, ...]


def scoring_batch(rows: Sequence[Encoded], slots: Sequence[int] | None = None) -> ScoringBatch:
    """Every choice of every row; a row's context goes through the base once."""
    build = _Builder()
    n = _shared(rows, slots)
    parents = (build.add(rows[0].context[:n], ()),) if n else ()
    span_slots = [] if slots is None else list(slots[:1]) * bool(n)
    scores: list[tuple[int, int, int]] = []
    owner = 0
    for i, row in enumerate(rows):
        context = build.add(row.context[n:], parents, len(row.context) - n)
        for choice in row.choices:
            scores.append((build.end(context), choice[0], owner))
            if len(choice) > 1:
                answer = build.add(choice[:-1], (*parents, context))
                start = build.spans[answer].start
                scores += [(start + j, token, owner) for j, token in enumerate(choice[1:])]
            owner += 1
        if slots is not None:
            span_slots += [slots[i]] * (len(build.spans) - len(span_slots))
    at, token, owners = (torch.tensor(column) for column in zip(*scores, strict=True))
    batch = Batch(torch.tensor(build.tokens), tuple(build.spans), None, None if slots is None else tuple(span_slots))
    return ScoringBatch(batch, at, token, owners, tuple(len(row.choices) for row in rows))


def scoring_order(rows: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Row indexes in batches of at most `budget` tokens (a longer row alone), similar lengths together.

    What all rows begin with is computed once per batch and not counted.
    """
    shared = shared_beginning([row.context for row in rows]) if rows else 0
    members: list[int] = []
    tokens = scored = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].context)):
        answers = sum(len(choice) - 1 for choice in rows[i].choices)
        more = len(rows[i].context) - shared + answers
        if members and (tokens + more > budget or scored + answers + 1 > MOST_SCORED):
            yield members
            members, tokens, scored = [], 0, 0
        members.append(i)
        tokens += more
        scored += answers + 1
    if members:
        yield members
