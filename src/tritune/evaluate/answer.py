"""Answers of a base under whatever edits are bound: the path that measures is the path that serves.

Classification: the log-likelihood of every choice of every row. Knows ids and a base; no task, no metric.
Shapes: K scored positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tritune.errors import Diverged
from tritune.models.pretrained import Base
from tritune.text.encode import Encoded
from tritune.text.pack import ScoringBatch, scoring_batch, scoring_order

#: tokens per forward pass: enough to keep two cores busy, little memory
BUDGET = 2048


@torch.no_grad()
def choice_log_likelihoods(
    base: Base,
    rows: Sequence[Encoded],
    *,
    slots: Sequence[int] | None = None,
    budget: int = BUDGET,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """Sum of token log-probabilities of each choice, per row, in the order of `rows`.

    Args:
        slots: the adaptation of each row, where a bank is bound.
        progress: called with the number of rows that were just answered.

    Raises:
        Diverged: a likelihood is not finite; the first choice would win every row.
    """
    answers: list[tuple[float, ...]] = [()] * len(rows)
    for members in scoring_order(rows, budget):
        packed = scoring_batch([rows[i] for i in members], None if slots is None else [slots[i] for i in members])
        totals = _totals(base, packed)
        first = 0
        for i, n in zip(members, packed.choices, strict=True):
            answers[i] = tuple(totals[first : first + n].tolist())
            first += n
        if progress:
            progress(len(members))
    return answers


def _totals(base: Base, packed: ScoringBatch) -> Tensor:
    """Log-likelihood of each (row, choice), in order. Several choices often read the same position: it is scored once."""
    at, which = torch.unique(packed.at_K, return_inverse=True)
    logits_KV = base.logits(packed.batch, at)
    which, token = which.to(logits_KV.device), packed.token_K.to(logits_KV.device)
    scores_K = logits_KV[which, token] - logits_KV.logsumexp(-1)[which]
    if not bool(scores_K.isfinite().all()):
        raise Diverged("Answers could not be scored: likelihoods are not finite. What was learned overflows the base.")
    totals = torch.zeros(sum(packed.choices), dtype=torch.float64)
    return totals.index_add(0, packed.owner_K, scores_K.double().cpu())
