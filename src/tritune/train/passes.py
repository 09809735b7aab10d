"""What of a step goes through the base at once, so that the memory of a run by itself is bounded by `batch_tokens`.

A micro-batch is cut by its rows' own tokens, which decides what is learned together. Virtual tokens behind a text are
computed once per row and come on top: a hundred short rows have two thousand of them. Then the micro-batch goes in several
passes, whose gradients add up to its own. (What rows share is computed in each.) Knows deltas by what they put beside rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tritune.methods.base import Delta
from tritune.models.past import Virtual
from tritune.text.encode import Encoded
from tritune.train.batches import evenly


class Passes:
    """How a run's micro-batches are divided.

    Args:
        lengths: tokens that each row brings into a micro-batch.
        budget: how many may be computed at once, with what is kept of them for the backward.
    """

    def __init__(self, delta: Delta, rows: Sequence[Encoded], lengths: Sequence[int], budget: int) -> None:
        with torch.no_grad():
            virtual = Virtual(delta.segments())
        stands = virtual.texts_stand(delta)
        own = [len(row.target) - 1 for row in rows] if stands else lengths
        self._sizes = [n + virtual.behind.get(None, 0) for n in own]
        self._budget = budget
        self._divides = bool(virtual.behind)

    def of(self, micro_batches: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Row indexes of each pass."""
        for members in micro_batches:
            yield from evenly(members, self._sizes, self._budget) if self._divides else [list(members)]
