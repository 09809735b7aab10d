"""Which rows go together, and when: a pure function of the seed, so a resumed run sees the rest in the same order.

Knows lengths only. Rows are shuffled, sorted by length inside large windows, cut by a token budget, and the batches
shuffled again: similar lengths meet, but no epoch is ordered by length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np

#: batches per window of the local sort
WINDOW = 12


def epoch_batches(lengths: Sequence[int], budget: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indexes of each micro-batch of one epoch; every row once. A row above the budget is a batch of its own."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    per_window = max(1, int(WINDOW * budget / max(1.0, float(np.mean(lengths)))))
    batches = []
    for start in range(0, len(order), per_window):
        window = sorted(order[start : start + per_window].tolist(), key=lambda i: lengths[i])
        batches += list(_cut(window, lengths, budget))
    return [batches[i] for i in rng.permutation(len(batches))]


def _cut(rows: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    tokens = 0
    for i in rows:
        if batch and tokens + lengths[i] > budget:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def evenly(members: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in their order, in as few parts as their sizes allow: even ones, each within the budget but for a row."""
    ends = list(accumulate(sizes[i] for i in members))
    whole = ends[-1] / math.ceil(ends[-1] / budget)
    parts: dict[int, list[int]] = {}
    for i, end in zip(members, ends, strict=True):
        parts.setdefault(int((end - sizes[i] / 2) / whole), []).append(i)
    return list(parts.values())


def steps_in(epochs: float, lengths: Sequence[int], budget: int, accumulate: int, seed: int) -> int:
    """Optimizer steps of so many epochs, at least one. Epochs are cut anew, so they differ by a step or two."""

    def of_epoch(epoch: int) -> int:
        return math.ceil(len(epoch_batches(lengths, budget, seed, epoch)) / accumulate)

    whole = int(epochs)
    part = epochs - whole
    # A tenth of ten steps is one, whatever the last binary digit says.
    begun = math.ceil(round(part * of_epoch(whole), 9)) if part else 0
    return max(1, sum(of_epoch(epoch) for epoch in range(whole)) + begun)


def steps(lengths: Sequence[int], budget: int, accumulate: int, seed: int, skip: int = 0) -> Iterator[list[list[int]]]:
    """Endless optimizer steps, each a list of micro-batches; the first `skip` are left out (they were taken before)."""
    epoch = 0
    while True:
        batches = epoch_batches(lengths, budget, seed, epoch)
        for start in range(0, len(batches), accumulate):
            if skip:
                skip -= 1
                continue
            yield batches[start : start + accumulate]
        epoch += 1
