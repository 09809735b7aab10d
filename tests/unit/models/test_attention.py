"""The one attention function against attention written out query by query: in tiles of any size, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracles
from tritune.errors import UnsupportedBase
from tritune.models import group, tiles
from tritune.models import layout as layout_of
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
#: queries of a tile, over how many keys weights are kept for the backward, and how many shared keys every span gets copied
WAYS = {
    "one tile, kept": (64, 384, 32),
    "one tile, shared keys apart": (64, 384, 0),
    "tiles of 4, some shared keys apart": (4, 384, 5),
    "tiles of 3, some made again": (3, 9, 32),
    "tiles of 3, some made again, shared keys apart": (3, 9, 0),
}


def cut(monkeypatch: pytest.MonkeyPatch, way: str) -> Layout:
    queries, kept_up_to, few = WAYS[way]
    monkeypatch.setattr(group, "QUERIES", queries)
    monkeypatch.setattr(tiles, "KEPT_UP_TO", kept_up_to)
    monkeypatch.setattr(layout_of, "FEW", few)
    return fresh_layout()


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


def fresh_layout() -> Layout:
    return build(Batch(torch.arange(N), SPANS), {}, torch.device("cpu"))


@pytest.fixture
def layout() -> Layout:
    return fresh_layout()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 6, 15])
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_it_is_attention_query_by_query(
    monkeypatch: pytest.MonkeyPatch, heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    q, k, v = tensors(*heads, d=5)
    want = oracles.attention(q, k, v, oracles.visible(SPANS, window), scale=0.3, softcap=softcap)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    slopes = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for way in WAYS:
        got = packed(q, k, v, cut(monkeypatch, way), scaling=0.3, sliding_window=window, softcap=softcap)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        for a, b in zip(torch.autograd.grad((got * weight).sum(), (q, k, v)), slopes, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_soft_caps_are_honoured_and_would_be_missed(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    layout = cut(monkeypatch, way)
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
    monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype
) -> None:
    """Scores of several hundred, masked keys and padded queries: still numbers, forward and backward."""
    layout = cut(monkeypatch, way)
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


@pytest.mark.parametrize(
    ("few", "first"), [(0, 31), (32, 31), (32, 1)], ids=["apart", "copied", "in a group with what they share"]
)
def test_what_many_rows_share_gets_all_of_their_gradients(
    monkeypatch: pytest.MonkeyPatch, few: int, first: int
) -> None:
    """Added up one by one in bf16, equal parts would stand still at 256 of them."""
    monkeypatch.setattr(layout_of, "FEW", few)
    rows, seen = 1024, first + 1
    spans = (Span(0, first), *(Span(first + i, 1, (0,)) for i in range(rows)))
    layout = build(Batch(torch.arange(first + rows), spans), {}, torch.device("cpu"))
    nothing = torch.zeros(first + rows, 1, 4, dtype=torch.bfloat16)
    v = nothing.clone().requires_grad_(True)
    out = packed(nothing, nothing, v, layout)
    (slope,) = torch.autograd.grad(out[first:].float().sum(), v)
    assert slope[:first].tolist() == [[[rows / seen] * 4]] * first
    assert slope[first:].tolist() == [[[1 / seen] * 4]] * rows


def test_long_rows_in_their_own_tiles_answer_the_same() -> None:
    """Without touching any size: rows of several tiles, whose weights are kept or not, short ones beside them, one window."""
    spans = (Span(0, 450), Span(450, 3), Span(453, 2, (0,)), Span(455, 780), Span(1235, 130))
    n = 1365
    layout = build(Batch(torch.arange(n), spans), {}, torch.device("cpu"))
    assert {len(g.cuts) for g in layout.groups} == {1, 2, 6, 7}
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, h, 4, generator=generator, dtype=torch.float64).requires_grad_(True) for h in (2, 1, 1))
    for window in (None, 100):
        want = oracles.attention(q, k, v, oracles.visible(spans, window), scale=0.5)
        got = packed(q, k, v, layout, sliding_window=window)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        weight = torch.randn(want.shape, generator=generator, dtype=torch.float64)
        of_got, of_want = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (got, want))
        for a, b in zip(
            of_got, of_want, strict=True
        ):  # over several tiles slopes of keys are added up in at least fp32
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_a_tile_computes_no_key_that_none_of_its_queries_sees() -> None:
    layout = build(Batch(torch.arange(512), (Span(0, 512),)), {}, torch.device("cpu"))
    (only,) = layout.groups
    whole, near = only.tiles(None), only.tiles(40)
    assert [(t.queries.start, t.keys.start, t.keys.stop) for t in whole] == [(i, 0, i + 64) for i in range(0, 512, 64)]
    assert all(t.keys.stop - t.keys.start <= 64 + 39 for t in near)
    assert all(t.hidden.shape[-1] < 64 for t in whole), "only around the diagonal is there anything to hide"


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
