"""Layout: on random forests of spans, who sees whom is the definition, nothing gets lost, little is padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import oracles
from tritune.models.attention import packed_attention
from tritune.models.base import BARE, Batch, Span
from tritune.models.layout import SLACK_SHARE, SLACK_TOKENS, Layout, build

CPU = torch.device("cpu")


@st.composite
def forests(draw: st.DrawFn, most: int = 12, longest: int = 40) -> tuple[Span, ...]:
    """Spans in packed order; each continues nothing, or an earlier span with all of that one's ancestors."""
    spans: list[Span] = []
    at = 0
    for i in range(draw(st.integers(1, most))):
        length = draw(st.integers(1, draw(st.sampled_from((3, longest)))))
        parent = draw(st.integers(-1, i - 1))
        parents = () if parent < 0 else (*spans[parent].parents, parent)
        spans.append(Span(at, length, parents))
        at += length
    return tuple(spans)


def batch_of(spans: tuple[Span, ...], slots: tuple[int, ...] | None = None) -> Batch:
    return Batch(torch.arange(sum(s.length for s in spans)), spans, None, slots)


def relation(layout: Layout, window: int | None) -> list[set[int]]:
    """Which tokens each packed token may see, read off the attention function: equal scores, and values that name keys."""
    n = len(layout.positions_N)
    nothing, names = torch.zeros(1, 1, n, 1, dtype=torch.float64), torch.eye(n, dtype=torch.float64)[None, None]
    weights = packed_attention(nn.Identity(), nothing, nothing, names, None, sliding_window=window, layout=layout)[0]
    seen = [set(row.nonzero()[:, 0].tolist()) for row in weights[0, :, 0]]
    for row, keys in zip(weights[0, :, 0], seen, strict=True):  # each key counts once
        torch.testing.assert_close(row[sorted(keys)], torch.full((len(keys),), 1 / len(keys), dtype=torch.float64))
    return seen


@settings(max_examples=40, deadline=None)
@given(spans=forests(), window=st.one_of(st.none(), st.integers(1, 50)))
def test_who_sees_whom_is_the_definition(spans: tuple[Span, ...], window: int | None) -> None:
    layout = build(batch_of(spans), {}, CPU)
    assert layout.positions_N.tolist() == oracles.positions(spans)
    assert relation(layout, window) == oracles.visible(spans, window)


@settings(max_examples=40, deadline=None)
@given(spans=forests(), virtual=st.integers(1, 9), window=st.one_of(st.none(), st.integers(1, 50)))
def test_a_virtual_segment_is_a_first_parent_of_every_span(
    spans: tuple[Span, ...], virtual: int, window: int | None
) -> None:
    layout = build(batch_of(spans), {None: virtual}, CPU)
    whole = (
        Span(0, virtual),
        *(Span(s.start + virtual, s.length, (0, *(p + 1 for p in s.parents))) for s in spans),
    )
    assert layout.n_virtual == virtual
    assert layout.positions_N.tolist() == oracles.positions(whole)
    assert relation(layout, window) == oracles.visible(whole, window)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_each_slot_sees_its_own_virtual_segment_only(data: st.DataObject) -> None:
    spans = data.draw(forests())
    virtual = {0: 3, 2: 5}
    slots: list[int] = []
    for span in spans:
        drawn = data.draw(st.sampled_from((BARE, 0, 1, 2)))
        slots.append(slots[span.parents[0]] if span.parents else drawn)
    layout = build(batch_of(spans, tuple(slots)), virtual, CPU)
    first = {0: 0, 2: 1}
    whole = [Span(0, 3), Span(3, 5)]
    for span, slot in zip(spans, slots, strict=True):
        own = (first[slot],) if slot in first else ()
        whole.append(Span(span.start + 8, span.length, (*own, *(p + 2 for p in span.parents))))
    assert relation(layout, None) == oracles.visible(whole)
    assert layout.positions_N.tolist() == oracles.positions(whole)
    assert layout.slot_N is not None
    wanted = [0] * 3 + [2] * 5 + [slot for span, slot in zip(spans, slots, strict=True) for _ in range(span.length)]
    assert layout.slot_N.tolist() == wanted


@settings(max_examples=40, deadline=None)
@given(spans=forests(most=30))
def test_every_token_is_asked_once_and_comes_back_in_order(spans: tuple[Span, ...]) -> None:
    layout = build(batch_of(spans), {None: 4}, CPU)
    asked = []
    for group in layout.groups:
        queries = group.query_BL.flatten()
        asked.append(queries if group.kept is None else queries[group.kept])
    back = torch.cat(asked)[layout.back_N]
    assert back.tolist() == list(range(4 + sum(s.length for s in spans)))


@settings(max_examples=40, deadline=None)
@given(spans=forests(most=40, longest=120))
def test_groups_pad_little_and_no_query_is_left_without_a_key(spans: tuple[Span, ...]) -> None:
    for group in build(batch_of(spans), {}, CPU).groups:
        B, L = group.query_BL.shape
        kept = torch.arange(B * L) if group.kept is None else group.kept
        lengths = torch.bincount(kept // L, minlength=B)
        assert int(lengths.max()) == L
        assert L - int(lengths.min()) <= slack(int(lengths.min()))
        keys = (~group.hidden(None)).sum(-1).amax(-1)
        past = keys - lengths
        assert int(past.max() - past.min()) <= slack(int(lengths.min() + past.min()))
        assert group.hidden(None).shape[2] <= L + int(past.max())
        for window in (None, 1, 2):
            assert bool((~group.hidden(window)).any(-1).all()), "a softmax over nothing is not a number"


def slack(length: int) -> int:
    return max(SLACK_TOKENS, int(SLACK_SHARE * length))


@pytest.mark.parametrize(("virtual", "slots"), [({0: 3}, None), ({0: 3, None: 2}, (0, 0))])
def test_a_segment_that_no_row_would_see_is_refused(
    virtual: dict[int | None, int], slots: tuple[int, ...] | None
) -> None:
    """Or a bank of prompts would answer as the bare base, and nobody would know."""
    with pytest.raises(AssertionError, match="segment"):
        build(batch_of((Span(0, 3), Span(3, 2)), slots), virtual, CPU)


def test_rows_of_one_length_share_one_group_without_padding() -> None:
    spans = tuple(Span(7 * i, 7) for i in range(50))
    layout = build(batch_of(spans), {}, CPU)
    assert len(layout.groups) == 1
    assert layout.groups[0].kept is None
    assert layout.groups[0].hidden(None).shape == (50, 7, 7)


def test_a_scoring_batch_needs_few_groups() -> None:
    """Twenty rows of similar length with six answers each behind a common beginning: not a product per row."""
    spans = [Span(0, 60)]
    at = 60
    for i in range(20):
        context = len(spans)
        spans.append(Span(at, 20 + i % 5, (0,)))
        at += 20 + i % 5
        for _ in range(6):
            spans.append(Span(at, 2, (0, context)))
            at += 2
    layout = build(batch_of(tuple(spans)), {}, CPU)
    assert len(layout.groups) <= 3


def test_long_and_short_pasts_in_turn_are_kept_apart() -> None:
    """Answers behind long contexts among short rows of the same lengths: two groups, nothing padded by the context."""
    spans = [Span(0, 300)]
    for i in range(40):
        spans.append(Span(spans[-1].start + spans[-1].length, 1 + i // 4, (0,) if i % 2 else ()))
    layout = build(batch_of(tuple(spans)), {}, CPU)
    assert sorted(group.hidden(None).shape[2] for group in layout.groups) == [10, 300, 310]


def test_what_all_rows_share_is_not_copied_for_each() -> None:
    """A hundred rows behind a prompt of fifty tokens hold fifty keys of it, not five thousand."""
    spans = (Span(0, 50), *(Span(50 + 4 * i, 4, (0,)) for i in range(100)))
    group = build(batch_of(spans), {}, CPU).groups[0]
    assert group.query_BL.shape == (100, 4)
    assert len(group.shared_P) == 50
    assert group.key_BS.numel() == 400


def test_masks_are_made_once_for_every_window() -> None:
    group = build(batch_of((Span(0, 5), Span(5, 9))), {}, CPU).groups[0]
    assert group.hidden(None) is group.hidden(None)
    assert group.hidden(3) is group.hidden(3)
    assert not torch.equal(group.hidden(None), group.hidden(3))
