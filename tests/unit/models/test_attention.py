"""The one attention function against attention written out query by query: both of its ways, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracles
from tritune.errors import UnsupportedBase
from tritune.models import attention
from tritune.models.attention import packed_attention
from tritune.models.base import Batch, Span
from tritune.models.layout import Layout, build

#: an instruction, rows behind it, answers behind a row, and rows of their own, of very different lengths
SPANS = (
    Span(0, 5),
    Span(5, 9, (0,)),
    Span(14, 3, (0, 1)),
    Span(17, 1, (0, 1)),
    Span(18, 4, (0,)),
    Span(22, 2, (0, 4)),
    Span(24, 1),
    Span(25, 17),
    Span(42, 14),
)
N = 56
WAYS = {"plain": 10**9, "fused": 0}


def tensors(H: int, K: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((N, H, d), (N, K, d), (N, K, d))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_(True) for s in shapes)
    return q, k, v


def packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, **options: Any) -> Tensor:
    """As a model of transformers calls it."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, weights = packed_attention(nn.Identity(), q, k, v, None, layout=layout, **options)
    assert weights is None
    return out[0]


@pytest.fixture
def layout() -> Layout:
    return build(Batch(torch.arange(N), SPANS), {}, torch.device("cpu"))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 6, 15])
def test_it_is_attention_query_by_query(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, heads: tuple[int, int], window: int | None
) -> None:
    q, k, v = tensors(*heads, d=5)
    want = oracles.attention(q, k, v, oracles.visible(SPANS, window), scale=0.3)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    slopes = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for fused_from in WAYS.values():
        monkeypatch.setattr(attention, "FUSED_FROM", fused_from)
        got = packed(q, k, v, layout, scaling=0.3, sliding_window=window)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        for a, b in zip(torch.autograd.grad((got * weight).sum(), (q, k, v)), slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_soft_caps_are_honoured_on_both_ways(monkeypatch: pytest.MonkeyPatch, layout: Layout, way: str) -> None:
    monkeypatch.setattr(attention, "FUSED_FROM", WAYS[way])
    q, k, v = tensors(4, 2, 5)
    seen = oracles.visible(SPANS, 9)
    got = packed(q, k, v, layout, scaling=2.0, sliding_window=9, softcap=1.5)
    torch.testing.assert_close(got, oracles.attention(q, k, v, seen, scale=2.0, softcap=1.5), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got, oracles.attention(q, k, v, seen, scale=2.0), atol=1e-2)


def test_the_scale_is_one_over_the_root_of_the_head_width_unless_given(layout: Layout) -> None:
    q, k, v = tensors(2, 2, 4)
    torch.testing.assert_close(packed(q, k, v, layout), packed(q, k, v, layout, scaling=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_narrow_formats_stay_close_and_never_give_nan(
    monkeypatch: pytest.MonkeyPatch, layout: Layout, way: str, dtype: torch.dtype
) -> None:
    """Scores of several hundred, masked keys and padded queries: still numbers, forward and backward."""
    monkeypatch.setattr(attention, "FUSED_FROM", WAYS[way])
    q, k, v = (t.detach() for t in tensors(4, 2, 8))
    narrow = [(t * s).to(dtype).requires_grad_(True) for t, s in ((q, 20.0), (k, 20.0), (v, 1.0))]
    got = packed(*narrow, layout, sliding_window=4)
    assert got.dtype is dtype
    wide = [t.detach().double() for t in narrow]
    want = oracles.attention(*wide, oracles.visible(SPANS, 4), scale=8**-0.5)
    error = (got.double() - want).detach().abs().mean()
    assert float(error) < {torch.bfloat16: 3e-2, torch.float32: 1e-4}[dtype]
    got.float().sum().backward()
    assert all(bool(t.grad is not None and t.grad.isfinite().all()) for t in narrow)


def test_a_long_row_takes_the_fused_way_and_answers_the_same() -> None:
    """Without touching the threshold: one row that is longer than it, short ones beside it, one window inside."""
    spans = (Span(0, 450), Span(450, 3), Span(453, 2, (0,)))
    layout = build(Batch(torch.arange(455), spans), {}, torch.device("cpu"))
    assert any(g.hidden(None)[0].numel() >= attention.FUSED_FROM for g in layout.groups)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(455, h, 4, generator=generator, dtype=torch.float64) for h in (2, 1, 1))
    got = packed(q, k, v, layout, sliding_window=100)
    want = oracles.attention(q, k, v, oracles.visible(spans, 100), scale=0.5)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"s_aux": torch.zeros(2)}, "sinks"),
        ({"attention_mask": torch.zeros(1, 1, N, N)}, "mask"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_it_cannot_do_it_refuses_by_name(layout: Layout, asked: dict[str, Any], word: str) -> None:
    q, k, v = (t.transpose(0, 1)[None] for t in tensors(2, 2, 4))
    options = {"attention_mask": None, **asked}
    with pytest.raises(UnsupportedBase, match=word):
        packed_attention(nn.Identity(), q, k, v, layout=layout, **options)


def test_without_a_layout_it_refuses() -> None:
    q, k, v = (t.transpose(0, 1)[None] for t in tensors(2, 2, 4))
    with pytest.raises(UnsupportedBase, match="layout"):
        packed_attention(nn.Identity(), q, k, v, None)


Break = Callable[[set[int], int], set[int]]


@pytest.mark.parametrize(
    "broken",
    [lambda seen, n: seen - {n - 1}, lambda seen, n: seen | {(n + 1) % N}, lambda seen, n: {n}],
    ids=["one key less", "one key ahead", "itself only"],
)
def test_the_comparison_would_notice(layout: Layout, broken: Break) -> None:
    q, k, v = tensors(4, 2, 5)
    seen = [broken(keys, n) or {n} for n, keys in enumerate(oracles.visible(SPANS))]
    got = packed(q, k, v, layout, scaling=0.3)
    assert not torch.allclose(got, oracles.attention(q, k, v, seen, scale=0.3), atol=1e-3)
