"""The loop that somebody who wants speed writes around a peer's model: no Trainer, fused AdamW, and the head only where
loss is taken, as far as transformers' own `logits_to_keep` goes. Rows of a batch are padded to the longest.

Shapes: B rows, L padded length, K last positions that get logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.models import build
from benchmarks.protocol import Row, Spec, read_rows
from benchmarks.worker import Clock

IGNORE = -100


def padded(rows: Sequence[Row], *, left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels (B, L); a label stands at the position that predicts it. The token padded with does not matter."""
    L = max(row.tokens for row in rows)
    ids, mask, labels = (torch.full((len(rows), L), fill) for fill in (0, 0, IGNORE))
    for i, row in enumerate(rows):
        first = L - row.tokens if left else 0
        here = slice(first, first + row.tokens)
        ids[i, here] = torch.tensor([*row.context, *row.target[:-1]])
        mask[i, here] = 1
        labels[i, first + len(row.context) - 1 : first + row.tokens] = torch.tensor(row.target)
    return ids, mask, labels


def prepare(spec: Spec, clock: Clock) -> Callable[[], None]:
    """Build the peer's model and an optimizer for what it trains."""
    rows = read_rows(Path(spec.rows))
    model = build(spec).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=0.0, fused=True)
    clock.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    # Padded in front, all answers stand at the end. A prompt that PEFT puts in front must touch the text, so there behind.
    left = spec.method not in ("ptuning", "prefix")

    def train() -> None:
        clock.start()
        for members in spec.batches:
            loss = _backward(model, spec, [rows[i] for i in members], left=left)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.step(loss)

    return train


def _backward(model: Any, spec: Spec, rows: Sequence[Row], *, left: bool) -> float:
    """The graph, and all that the model gave, is gone when this returns, as on tritune's side."""
    ids_BL, mask_BL, labels_BL = (t.to(spec.device) for t in padded(rows, left=left))
    first, end = int((labels_BL != IGNORE).any(0).nonzero()[0]), ids_BL.shape[1]
    # not as a number: then the head's input has gaps, and torch copies the head's weight for every row
    kept = torch.arange(first - end, 0, device=ids_BL.device)  # from the end: PEFT puts a prompt in front
    with torch.autocast(torch.device(spec.device).type, torch.bfloat16, spec.setup.dtype == "autocast"):
        output = model(input_ids=ids_BL, attention_mask=mask_BL, logits_to_keep=kept, use_cache=spec.method == "prefix")
    logits_BKV, labels_BK = output.logits[:, first - end :], labels_BL[:, first:]
    scored = labels_BK != IGNORE
    loss = F.cross_entropy(logits_BKV[scored].float(), labels_BK[scored])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()
