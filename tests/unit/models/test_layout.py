"""Layout: on random forests of spans, who sees whom is the definition, nothing gets lost, little is padded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests import oracles
from tritune.models.attention import packed_attention
from tritune.models.base import BARE, Batch, Span
from tritune.models.layout import FEW, SLACK_SHARE, SLACK_TOKENS, Layout, build
from tritune.models.past import Given
from tritune.models.pieces import text_batch
from tritune.models.round_numbers import missing

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


class OneLayer(nn.Module):
    """As an attention function meets it."""

    layer_idx = 0


def relation(layout: Layout, window: int | None, given: int = 0) -> list[set[int]]:
    """Which keys each packed token may see, read off the attention function: equal scores, and values that name keys.
    The first `given` keys are not packed."""
    n = len(layout.positions_N)
    names = torch.eye(given + n, dtype=torch.float64)
    nothing = torch.zeros(1, 1, n, given + n, dtype=torch.float64)
    if given:
        past = torch.stack([torch.zeros(given, given + n, dtype=torch.float64), names[:given]])[None, :, :, None]
        layout = replace(layout, past=Given(past))
    values = names[given:][None, None]
    weights = packed_attention(OneLayer(), nothing, nothing, values, None, sliding_window=window, layout=layout)[0]
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
    assert layout.asked.tolist() == list(range(virtual, virtual + sum(s.length for s in spans)))
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
@given(spans=forests(), virtual=st.sampled_from((0, 3, 20)), window=st.one_of(st.none(), st.integers(1, 50)))
def test_a_round_number_of_tokens_changes_nothing_for_those_that_are_read(
    spans: tuple[Span, ...], virtual: int, window: int | None
) -> None:
    front = {None: virtual} if virtual else {}
    plain, round_ = (build(batch_of(spans), front, CPU, round_number=wanted) for wanted in (False, True))
    n = len(plain.positions_N)
    assert len(round_.positions_N) == n + round_.n_filling
    assert missing(len(round_.positions_N)) == 0
    assert round_.positions_N[:n].tolist() == plain.positions_N.tolist()
    assert round_.asked.tolist() == plain.asked.tolist()
    assert relation(round_, window)[:n] == relation(plain, window)
    assert len(round_.groups) <= len(plain.groups) + 2


def test_round_numbers_are_few_and_near() -> None:
    numbers = [n + missing(n) for n in range(1, 4097)]
    assert all(missing(n) < max(8, n / 16) for n in range(1, 4097))
    assert len({n for n in numbers if 1024 <= n < 2048}) == 16


# --- virtual tokens behind texts, and keys that are given ---


@st.composite
def texts(draw: st.DrawFn) -> tuple[tuple[Span, ...], tuple[int, ...]]:
    """A forest where every row's text ends once from root to leaf, and a slot for each tree."""
    spans: list[Span] = []
    slots: list[int] = []
    forest = draw(forests())
    inner = {p for span in forest for p in span.parents}
    for i, span in enumerate(forest):
        fresh = not any(spans[p].text for p in span.parents)
        text = draw(st.integers(1, span.length)) if fresh and (i not in inner or draw(st.booleans())) else None
        spans.append(Span(span.start, span.length, span.parents, text))
        slots.append(slots[span.parents[0]] if span.parents else draw(st.sampled_from((BARE, 0, 1))))
    return tuple(spans), tuple(slots)


@dataclass
class WrittenOut:
    """The same rows with the virtual tokens in their places; `token[i]`: where the batch's token i is now."""

    spans: list[Span]
    token: dict[int, int]
    answers_for: dict[int, int]  # last token of a text -> the last virtual token behind it
    text: set[int]  # tokens of the texts and of what they see


def written_out(
    spans: tuple[Span, ...],
    slots: tuple[int, ...],
    front: dict[int, int],
    behind: dict[int, int],
    keys_behind: dict[int, int] | None = None,
) -> WrittenOut:
    out = WrittenOut([], {}, {}, set())
    first, keys, became, at = {}, {}, [], 0
    for place, lengths in ((keys, keys_behind or {}), (first, front)):
        for slot, P in lengths.items():
            place[slot] = (len(out.spans),)
            out.spans.append(Span(at, P))
            at += P
    for span, slot in zip(spans, slots, strict=True):
        parents = (*first.get(slot, ()), *(q for p in span.parents for q in became[p]))
        P, cut = behind.get(slot, 0), span.text or span.length
        virtual = P if span.text else 0
        out.token |= {span.start + i: at + i + (virtual if i >= cut else 0) for i in range(span.length)}
        if span.text:
            for p in span.parents:
                out.text |= {out.token[spans[p].start + i] for i in range(spans[p].length)}
            out.text |= {at + i for i in range(cut)}
            if P:
                out.answers_for[span.start + cut - 1] = at + cut + P - 1
        became.append((len(out.spans),))
        out.spans.append(Span(at, cut, parents))
        if span.length + virtual > cut:
            text = (len(out.spans) - 1, *keys.get(slot, ()))
            became[-1] = (*text, len(out.spans))
            out.spans.append(Span(at + cut, span.length + virtual - cut, (*parents, *text)))
        at += span.length + virtual
    return out


@settings(max_examples=60, deadline=None)
@given(texts(), st.integers(0, 4), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 30)))
def test_virtual_tokens_behind_a_text_are_seen_by_what_follows_it(
    drawn: tuple[tuple[Span, ...], tuple[int, ...]], n_front: int, n_behind: int, window: int | None
) -> None:
    spans, slots = drawn
    slots_with = [s for s in (0, 1) if any(sp.text for sp, own in zip(spans, slots, strict=True) if own == s)]
    front, behind = ({0: n_front} if n_front else {}), {s: n_behind + s for s in slots_with}
    layout = build(batch_of(spans, slots), front, CPU, behind=behind)
    whole = written_out(spans, slots, front, behind)
    assert layout.positions_N.tolist() == oracles.positions(whole.spans)
    assert relation(layout, window) == oracles.visible(whole.spans, window)
    wanted = [whole.answers_for.get(i, whole.token[i]) for i in range(len(layout.asked))]
    assert layout.asked.tolist() == wanted


@settings(max_examples=60, deadline=None)
@given(texts(), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 30)))
def test_given_texts_are_seen_as_if_they_were_computed(
    drawn: tuple[tuple[Span, ...], tuple[int, ...]], n_behind: int, window: int | None
) -> None:
    spans, slots = drawn
    behind = {s: n_behind + s for s in (0, 1) if any(sp.text for sp, own in zip(spans, slots, strict=True) if own == s)}
    whole = written_out(spans, slots, {}, behind)
    n = sum(span.length for span in whole.spans)
    computed = [i for i in range(n) if i not in whole.text]
    if not behind or not computed:
        return
    layout = build(batch_of(spans, slots), {}, CPU, behind=behind, texts_given=True)
    order = [*sorted(whole.text), *computed]
    assert layout.positions_N.tolist() == [oracles.positions(whole.spans)[i] for i in computed]
    seen = oracles.visible(whole.spans, window)
    assert relation(layout, window, len(whole.text)) == [{order.index(key) for key in seen[i]} for i in computed]
    for i, packed in enumerate(layout.asked.tolist()):
        wanted = whole.answers_for.get(i, whole.token[i])
        assert packed == (computed.index(wanted) if wanted in computed else -1)
    text = text_batch(batch_of(spans, slots))
    assert text.tokens_N.tolist() == [i for i in range(len(layout.asked)) if whole.token[i] in whole.text]
    assert oracles.positions(text.spans) == [oracles.positions(whole.spans)[i] for i in sorted(whole.text)]


@settings(max_examples=60, deadline=None)
@given(texts(), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.one_of(st.none(), st.integers(1, 30)))
def test_keys_behind_a_text_are_seen_by_what_follows_it_alone(
    drawn: tuple[tuple[Span, ...], tuple[int, ...]], cues: int, keys: int, texts_given: bool, window: int | None
) -> None:
    """Slot 0 has them and slot 1 has other virtual tokens there, whether texts are computed or given too."""
    spans, slots = drawn
    there = [s for s in (0, 1) if any(sp.text for sp, own in zip(spans, slots, strict=True) if own == s)]
    behind, deep = {s: cues + s for s in there}, {s: keys for s in there if s == 0}
    whole = written_out(spans, slots, {}, behind, deep)
    n, n_keys = sum(span.length for span in whole.spans), sum(deep.values())
    given_ = [*range(n_keys), *(sorted(whole.text) if texts_given else ())]
    computed = [i for i in range(n) if i not in set(given_)]
    if not computed:
        return
    layout = build(batch_of(spans, slots), {}, CPU, behind=behind, deep_behind=deep, texts_given=texts_given)
    order = [*given_, *computed]
    assert layout.positions_N.tolist() == [oracles.positions(whole.spans)[i] for i in computed]
    seen = oracles.visible(whole.spans, window)
    assert relation(layout, window, len(given_)) == [{order.index(key) for key in seen[i]} for i in computed]
    for i, packed in enumerate(layout.asked.tolist()):
        wanted = whole.answers_for.get(i, whole.token[i])
        assert packed == (computed.index(wanted) if wanted in computed else -1)


@settings(max_examples=40, deadline=None)
@given(spans=forests(), given=st.integers(1, 9), window=st.one_of(st.none(), st.integers(1, 30)))
def test_given_keys_in_front_are_a_first_parent_of_every_span(
    spans: tuple[Span, ...], given: int, window: int | None
) -> None:
    layout = build(batch_of(spans), {}, CPU, deep={None: given})
    whole = (Span(0, given), *(Span(s.start + given, s.length, (0, *(p + 1 for p in s.parents))) for s in spans))
    assert layout.positions_N.tolist() == oracles.positions(whole)[given:]
    assert relation(layout, window, given) == oracles.visible(whole, window)[given:]
    assert layout.asked.tolist() == list(range(len(layout.asked)))


def test_a_segment_behind_texts_that_no_span_marks_is_refused() -> None:
    for spans in ((Span(0, 3),), (Span(0, 3, text=3), Span(3, 2))):
        with pytest.raises(AssertionError, match="where its text ends"):
            build(batch_of(spans), {}, CPU, behind={None: 2})
    with pytest.raises(AssertionError, match="ends twice"):
        build(batch_of((Span(0, 3, text=3), Span(3, 2, (0,), text=1))), {}, CPU, behind={None: 2})
    with pytest.raises(AssertionError, match="inside its span"):
        build(batch_of((Span(0, 3, text=4),)), {}, CPU, behind={None: 2})
    with pytest.raises(AssertionError, match="no virtual token there"):
        build(batch_of((Span(0, 3, text=3),)), {}, CPU, deep_behind={None: 2})


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
    """A hundred rows behind a prompt of one token more than are copied hold its keys once, not a hundred times."""
    n = FEW + 1
    spans = (Span(0, n), *(Span(n + 4 * i, 4, (0,)) for i in range(100)))
    group = build(batch_of(spans), {}, CPU).groups[0]
    assert group.query_BL.shape == (100, 4)
    assert (len(group.shared_P), group.n_copied) == (n, 0)
    assert group.key_BS.numel() == 400


def test_a_few_shared_keys_are_copied() -> None:
    """Products of their own would cost more; but no key of another span is among a span's own then."""
    spans = (Span(0, FEW), *(Span(FEW + 4 * i, 4, (0,)) for i in range(100)))
    layout = build(batch_of(spans), {}, CPU)
    group = layout.groups[0]
    assert (group.n_copied, len(group.shared_P), group.key_BS.shape) == (FEW, 0, (100, FEW + 4))
    assert layout.own_keys.once
    assert layout.own_keys.keys.tolist() == list(range(FEW + 400))


def test_masks_are_made_once_for_every_window() -> None:
    group = build(batch_of((Span(0, 5), Span(5, 9))), {}, CPU).groups[0]
    assert group.tiles(None) is group.tiles(None)
    assert group.tiles(3) is group.tiles(3)
    assert not torch.equal(group.tiles(None)[0].hidden, group.tiles(3)[0].hidden)
