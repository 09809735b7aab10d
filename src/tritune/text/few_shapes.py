"""Batches of few shapes: what a batch lacks to round numbers of tokens, rows and labels is filled up with rows that nobody
reads, so that steps repeat a shape and can be recorded (`train/graphs.py`). Exact: no row sees another's tokens.

Knows ids and spans; no model. Shapes: N packed tokens, K labelled positions.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tritune.models.base import IGNORE, Batch, Span

#: what numbers of tokens, of spans and of labels are multiples of
TOKENS, SPANS, LABELS = 256, 16, 16


def rounded(batch: Batch) -> Batch:
    """The batch with rows behind it that begin as its last one does, and of which nothing is learned. They are no longer than
    the longest of those, which the base is known to take."""
    assert batch.slots is None
    assert batch.labels_N is not None
    n, spans = len(batch.tokens_N), len(batch.spans)
    n_spans = -spans % SPANS
    n_tokens = -(n + n_spans) % TOKENS + n_spans
    if not n_tokens:
        return batch
    n_spans, last = n_spans or SPANS, batch.spans[-1]
    longest = max(span.length for span in batch.spans if span.parents == last.parents)
    while n_tokens < n_spans:
        n_tokens += TOKENS
    while n_tokens > n_spans * longest:
        n_spans += SPANS
    ends = [n_tokens * i // n_spans for i in range(n_spans + 1)]
    more = tuple(Span(n + begin, end - begin, last.parents, last.text and end - begin) for begin, end in pairwise(ends))
    return Batch(
        torch.cat([batch.tokens_N, batch.tokens_N[:1].expand(n_tokens)]),
        (*batch.spans, *more),
        torch.cat([batch.labels_N, torch.full((n_tokens,), IGNORE)]),
    )


def learned(batch: Batch) -> tuple[Tensor, Tensor]:
    """Positions (K,) with a label, and the labels: a round number of them, the last of which are IGNORE."""
    assert batch.labels_N is not None
    at_K = (batch.labels_N != IGNORE).nonzero()[:, 0]
    n, labels_K = -len(at_K) % LABELS, batch.labels_N[at_K]
    return torch.cat([at_K, at_K.new_zeros(n)]), torch.cat([labels_K, labels_K.new_full((n,), IGNORE)])
