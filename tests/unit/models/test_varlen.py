"""What the kernel of a GPU is told, on a processor: spans as plain causal rows, by a slow loop in the kernel's place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.laws.conftest import batch_of, ids_of
from tritune.models import varlen
from tritune.models.base import Batch, DeepSegment, NoEdits, Segment, Span
from tritune.models.layout import build
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.models.varlen import _Taken


def slow(
    q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, q_ends: Tensor, k_ends: Tensor, *longest: int, **how: object
) -> Tensor:
    """Span by span: the queries are the last tokens of the span's keys."""
    (back, ahead), scale = how["window_size"], how["scale"]  # type: ignore[misc]  # as the kernel is called
    assert ahead == 0
    found = []
    for (q0, q1), (k0, k1) in zip(pairwise(q_ends.tolist()), pairwise(k_ends.tolist()), strict=True):
        L, T = q1 - q0, k1 - k0
        assert longest[0] >= L
        assert longest[1] >= T
        repeat = q_NHd.shape[1] // k_NKd.shape[1]
        k, v = (t[k0:k1].repeat_interleave(repeat, 1).transpose(0, 1) for t in (k_NKd, v_NKd))
        score = q_NHd[q0:q1].transpose(0, 1) @ k.transpose(1, 2) * scale
        distance = torch.arange(T - L, T)[:, None] - torch.arange(T)
        hidden = (distance < 0) | (distance > back) if back >= 0 else distance < 0
        found.append((score.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@pytest.fixture
def by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every attention goes the GPU's way; how often it did."""
    calls: list[int] = []

    def laid_out(*args: object, **options: object) -> object:
        return build(*args, **options, varlen=True)  # type: ignore[arg-type]

    monkeypatch.setattr("tritune.models.pretrained.build", laid_out)
    monkeypatch.setattr(varlen, "runs_here", lambda query, softcap: softcap is None)
    monkeypatch.setattr(varlen, "_kernel", lambda: lambda *args, **how: calls.append(1) or slow(*args, **how))
    return calls


class Bound(NoEdits):
    def __init__(self, *segments: Segment | DeepSegment) -> None:
        self.held = segments

    def segments(self) -> tuple[Segment | DeepSegment, ...]:
        return self.held


def shared() -> Batch:
    """Two answers behind a context behind an instruction, and a row by itself."""
    ids = ids_of((6, 7, 2, 3, 9), seed=4)
    starts = [sum(map(len, ids[:i])) for i in range(len(ids))]
    seen: list[tuple[int, ...]] = [(), (0,), (0, 1), (0, 1), ()]
    texts = [None, 7, None, None, 9]
    spans = tuple(Span(s, len(row), p, t) for s, row, p, t in zip(starts, ids, seen, texts, strict=True))
    return Batch(torch.tensor([i for row in ids for i in row]), spans)


def segments_of(kind: str, base: Base) -> tuple[Segment | DeepSegment, ...]:
    torch.manual_seed(0)
    n, heads, width = base.cache_shape
    prompt_PD = torch.randn(4, base.d_embedding, requires_grad=True)
    deep = torch.randn(n, 2, 4, heads, width, requires_grad=True)
    kinds: dict[str, tuple[Segment | DeepSegment, ...]] = {
        "bare": (),
        "front": (Segment(prompt_PD),),
        "behind": (Segment(prompt_PD, behind=True),),
    }
    kinds |= {"deep": (DeepSegment(deep),), "deep-behind": (DeepSegment(deep, behind=True), *kinds["behind"])}
    return kinds[kind]


@pytest.mark.parametrize("kind", ["bare", "front", "behind", "deep", "deep-behind"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_spans_are_plain_causal_rows(family: str, kind: str, request: pytest.FixtureRequest) -> None:
    base = tiny_base(family)
    at_K = torch.tensor([span.start + span.length - 1 for span in shared().spans[2:]])
    found = []
    for way in ("groups", "kernel"):
        if way == "kernel":
            calls: list[int] = request.getfixturevalue("by_the_kernel")
        held = segments_of(kind, base)
        with base.bind(Bound(*held)):
            logits = base.logits(shared(), at_K)
        learned = [s.embeddings_PD if isinstance(s, Segment) else s.layers_n2PKd for s in held]
        found.append([logits, *torch.autograd.grad(logits.square().sum(), learned)] if learned else [logits])
    assert calls
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def test_rows_without_anything_in_front_are_taken_as_they_lie(by_the_kernel: list[int]) -> None:
    layout = build(batch_of(ids_of((3, 5))), {}, torch.device("cpu"), varlen=True)
    assert layout.rows is not None
    assert layout.rows.key_T is None
    assert layout.rows.query_ends.tolist() == layout.rows.key_ends.tolist() == [0, 3, 8]
    assert layout.rows.longest == (5, 5)


def test_processors_soft_caps_and_odd_widths_go_by_groups() -> None:
    assert not varlen.runs_here(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16), None)
    assert build(batch_of(ids_of((3,))), {}, torch.device("cpu")).rows is None


def test_gradients_of_a_shared_key_are_summed_wide() -> None:
    """256 rows send 1/256 each: in bf16 the sum would stop long before 1."""
    x = torch.ones(1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    taken = _Taken.apply(x, torch.zeros(1024, dtype=torch.long))
    (taken / 256).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.bfloat16
    assert torch.equal(x.grad, torch.full_like(x.grad, 4.0))
