"""Edits for tests, and what is checked on every family against stock transformers; no tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of, packed_logits, rows_of, stock_logits, stock_of
from tritune.models.base import Batch, NoEdits, Role, Segment, Site, Span
from tritune.models.pretrained import Base
from tritune.models.tiny import CONFIGS

CLOSE = {"rtol": 1e-4, "atol": 3e-5}
#: shorter and longer than every window of the tiny configs, the shortest possible, and equal ones
LENGTHS = (9, 1, 14, 5, 9, 23, 2)

each_base = pytest.mark.parametrize("name", CONFIGS)


@dataclass
class Prompt(NoEdits):
    """Virtual tokens, as a method would bring them."""

    given: Sequence[Segment]

    def segments(self) -> Sequence[Segment]:
        return self.given


def prompt_of(base: Base, P: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(P, base.d_embedding, generator=generator) * float(base.embedding.weight.std())


@dataclass
class Recorder(NoEdits):
    """Sees every site of a base; pushes one of them, at one token or at all."""

    base: Base
    pushed: str | None = None
    token: int | None = None
    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)

    def sites(self) -> Sequence[Site]:
        return self.base.sites

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        assert slot_N is None
        assert int(x_ND.max()) < site.d_in if site.role is Role.EMBED else x_ND.shape[1] == site.d_in
        assert y_NE.shape[1] == site.d_out
        assert x_ND.shape[0] == y_NE.shape[0]
        self.x[site.key] = x_ND.clone()
        if site.key == self.pushed:
            push = 0.5 * torch.randn(y_NE.shape, generator=torch.Generator().manual_seed(3))
            if self.token is not None:
                push *= (torch.arange(len(y_NE)) == self.token)[:, None]
            y_NE = y_NE + push
        self.y[site.key] = y_NE.clone()
        return y_NE


def record(base: Base, rows: Sequence[Sequence[int]], **options: Any) -> tuple[Recorder, list[Tensor]]:
    recorder = Recorder(base, **options)
    with torch.no_grad(), base.bind(recorder):
        logits = packed_logits(base, rows)
    assert set(recorder.x) == {site.key for site in base.sites}
    return recorder, logits


@dataclass
class Term(NoEdits):
    """y + x M at one site: what a low-rank method adds, with M given."""

    site: Site
    matrix_DE: Tensor

    def sites(self) -> Sequence[Site]:
        return (self.site,)

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        return y_NE + x_ND @ self.matrix_DE


@torch.no_grad()
def check_packed_rows_are_solo_rows(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS)
    wanted = [stock_logits(model, row) for row in rows]
    generator = torch.Generator().manual_seed(1)
    for order in (list(range(len(rows))), *(torch.randperm(len(rows), generator=generator).tolist() for _ in range(2))):
        for i, logits in zip(order, packed_logits(base, [rows[i] for i in order]), strict=True):
            torch.testing.assert_close(logits, wanted[i], **CLOSE)


@torch.no_grad()
def check_shared_spans_are_whole_rows(name: str) -> None:
    """An instruction, contexts behind it, several answers behind each context: as if every row were written out."""
    base, model = base_of(name), stock_of(name)
    instruction, a, b, a1, a2, b1, b2, alone = rows_of((8, 5, 12, 3, 1, 2, 9, 6), seed=2)
    parts = [instruction, a, a1, a2, b, b1, b2, alone]
    parents: list[tuple[int, ...]] = [(), (0,), (0, 1), (0, 1), (0,), (0, 4), (0, 4), ()]
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    spans = tuple(Span(s, len(p), up) for s, p, up in zip(starts, parts, parents, strict=True))
    batch = Batch(torch.tensor([i for part in parts for i in part]), spans)
    logits = base.logits(batch, torch.arange(len(batch.tokens_N)))
    for span, part, up in zip(spans, parts, parents, strict=True):
        whole = [i for p in up for i in parts[p]] + part
        wanted = stock_logits(model, whole)[-len(part) :]
        torch.testing.assert_close(logits[span.start : span.start + span.length], wanted, **CLOSE)


@torch.no_grad()
def check_a_virtual_segment_is_a_prepended_prompt(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS, seed=3)
    for P in (1, 4, 10):
        prompt = prompt_of(base, P)
        with base.bind(Prompt([Segment(prompt)])):
            packed = packed_logits(base, rows)
        for row, logits in zip(rows, packed, strict=True):
            torch.testing.assert_close(logits, stock_logits(model, row, prompt), **CLOSE)


CHECKS: dict[str, Callable[[str], None]] = {
    "packed": check_packed_rows_are_solo_rows,
    "shared": check_shared_spans_are_whole_rows,
    "virtual": check_a_virtual_segment_is_a_prepended_prompt,
}
