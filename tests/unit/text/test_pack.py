"""Packing: labels stand where they are predicted, sharing never changes a number, scores are those of whole rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import base_of, stock_log_likelihood, stock_logits, stock_of
from tritune.errors import Diverged
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.models.base import BARE, IGNORE, NoEdits, Segment, Span
from tritune.tasks.base import Prompt
from tritune.text import pack
from tritune.text.encode import Encoded, Encoder
from tritune.text.pack import WORTH_SHARING, scoring_batch, scoring_order, shared_beginning, training_batch
from tritune.train.loop import batch_loss

I = IGNORE  # noqa: E741  # the expectations below are read as pictures


def row(context: Sequence[int], target: Sequence[int], name: str = "r") -> Encoded:
    return Encoded(name, tuple(context), tuple(target))


# --- training ---


def test_labels_stand_at_the_positions_that_predict_the_answer() -> None:
    batch = training_batch([row((11, 12, 13), (7,)), row((21, 22), (8, 9, 10))])
    assert batch.tokens_N.tolist() == [11, 12, 13, 21, 22, 8, 9]
    assert batch.labels_N is not None
    assert batch.labels_N.tolist() == [I, I, 7, I, 8, 9, 10]
    assert batch.spans == (Span(0, 3, text=3), Span(3, 4, text=2))
    assert batch.slots is None


def test_a_context_of_one_token_and_a_long_answer() -> None:
    batch = training_batch([row((5,), (1, 2, 3, 4))])
    assert batch.tokens_N.tolist() == [5, 1, 2, 3]
    assert batch.labels_N is not None
    assert batch.labels_N.tolist() == [1, 2, 3, 4]


def test_a_common_beginning_is_computed_once_and_carries_no_label() -> None:
    common = tuple(range(100, 100 + WORTH_SHARING))
    batch = training_batch([row((*common, 1, 2), (7, 8)), row((*common, 3), (9,)), row((*common, 1, 4), (7,))])
    assert batch.spans == (
        Span(0, WORTH_SHARING),
        Span(WORTH_SHARING, 3, (0,), text=2),
        Span(WORTH_SHARING + 3, 1, (0,), text=1),
        Span(WORTH_SHARING + 4, 2, (0,), text=2),
    )
    assert batch.tokens_N.tolist() == [*common, 1, 2, 7, 3, 1, 4]
    assert batch.labels_N is not None
    assert batch.labels_N.tolist() == [*([I] * WORTH_SHARING), I, 7, 8, 9, I, 7]


def test_a_row_without_an_answer_cannot_be_trained_on() -> None:
    """Its labels would be one short, and every label behind it would stand at a wrong token."""
    with pytest.raises(AssertionError):
        training_batch([row((1, 2, 3), ()), row((4, 5), (6,))])


rows_of_ids = st.lists(st.integers(3, 6), min_size=1, max_size=60).map(tuple)


@settings(max_examples=200, deadline=None)
@given(st.lists(rows_of_ids, min_size=1, max_size=8), st.integers(0, 40))
def test_a_shared_beginning_never_swallows_a_whole_row(rows: list[tuple[int, ...]], common: int) -> None:
    rows = [((1,) * common) + r for r in rows]
    n = shared_beginning(rows)
    assert all(len(r) > n for r in rows)
    assert len({r[:n] for r in rows}) == 1
    longest = min(
        next((i for i, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1), 10**9), min(map(len, rows)) - 1
    )
    assert n == (longest if longest * (len(rows) - 1) >= WORTH_SHARING else 0)


def test_equal_rows_keep_a_token_each() -> None:
    assert shared_beginning([(1,) * 50, (1,) * 50]) == 49
    assert shared_beginning([(1,) * 50, (1,) * 80]) == 49
    assert shared_beginning([(1,) * 50]) == 0


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_answer_token_is_learned_once_and_from_what_stands_before_it(data: st.DataObject) -> None:
    common = data.draw(st.sampled_from((0, 20, 40)))
    rows = []
    for _ in range(data.draw(st.integers(1, 6))):
        context = (*([9] * common), *data.draw(rows_of_ids))
        rows.append(row(context, data.draw(st.lists(st.integers(10, 12), min_size=1, max_size=5))))
    batch = training_batch(rows)
    assert batch.labels_N is not None
    assert batch.labels_N.shape == batch.tokens_N.shape
    learned = []
    for span in batch.spans:
        before = [i for p in span.parents for i in span_tokens(batch.tokens_N, batch.spans[p])]
        own = span_tokens(batch.tokens_N, span)
        labels = span_tokens(batch.labels_N, span)
        found = [((*before, *own[: i + 1]), label) for i, label in enumerate(labels) if label != IGNORE]
        learned += found
    wanted = [((*r.context, *r.target[:i]), t) for r in rows for i, t in enumerate(r.target)]
    assert learned == wanted


def span_tokens(tokens: torch.Tensor, span: Span) -> list[int]:
    return tokens[span.start : span.start + span.length].tolist()


@torch.no_grad()
def test_the_loss_of_a_packed_batch_is_the_sum_of_the_rows_losses() -> None:
    base, model = base_of("gemma2"), stock_of("gemma2")
    generator = random.Random(0)
    common = [generator.randrange(3, 250) for _ in range(40)]
    rows = [
        row([*common, *(generator.randrange(3, 250) for _ in range(2 + 3 * i))], [5 + i] * (1 + i % 3))
        for i in range(5)
    ]
    batch = training_batch(rows)
    assert len(batch.spans) == 6, "the beginning is shared"
    wanted = -sum(stock_log_likelihood(model, r.context, r.target) for r in rows)
    assert float(batch_loss(base, batch)) == pytest.approx(wanted, rel=1e-5)


# --- scoring ---

LABELS = {
    "one token each": (" a", " b"),
    "several tokens": (" very good", " bad", " neither good nor bad"),
    "twenty": tuple(f" label number {i}" for i in range(20)),
    "one the beginning of another": (" good", " good thing", " good thing indeed", " g"),
    "Russian": (" хорошо", " плохо", " так себе", " хор"),
}
TEXTS = (
    "A fine film, all in all.\nLabel:",
    "Bad.\nLabel:",
    "Ужасно скучно, уснул на середине.\nLabel:",
    "x\nLabel:",
    "A fine film, all in all, though far too long for me.\nLabel:",
    "A fine film\nLabel:",
)


def encoded(labels: tuple[str, ...], beginning: str = "") -> list[Encoded]:
    prompts = [Prompt(beginning + text, labels[i % len(labels)], labels) for i, text in enumerate(TEXTS)]
    names = [str(i) for i in range(len(prompts))]
    return Encoder(base_of("llama").tokenizer, 250).encode(prompts, names, names)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_scores_are_those_of_every_row_written_out_whole(name: str, labels: str) -> None:
    """Whatever the budget, with and without a common beginning, in the order of the rows."""
    base, model = base_of(name), stock_of(name)
    for beginning in ("", "Instruction: say what you think of this.\n"):
        rows = encoded(LABELS[labels], beginning)
        wanted = [[stock_log_likelihood(model, r.context, c) for c in r.choices] for r in rows]
        for budget in (1, 60, 400, 100_000):
            got = choice_log_likelihoods(base, rows, budget=budget)
            assert [len(g) for g in got] == [len(w) for w in wanted]
            for g, w in zip(got, wanted, strict=True):
                assert g == pytest.approx(w, rel=1e-4, abs=2e-4), budget


def test_few_positions_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    rows = encoded(LABELS["several tokens"])
    wanted = choice_log_likelihoods(base, rows)
    monkeypatch.setattr(pack, "MOST_SCORED", 5)
    assert [len(members) for members in scoring_order(rows, 10**6)] == [1] * len(rows)
    for g, w in zip(choice_log_likelihoods(base, rows), wanted, strict=True):
        assert g == pytest.approx(w, rel=1e-5, abs=1e-5)


def test_scores_under_a_prompt_per_row_are_those_of_prepended_prompts() -> None:
    """A bank: rows of two prompts and bare ones, in one batch, where a common beginning may not be shared."""
    base, model = base_of("gpt2"), stock_of("gpt2")
    generator = torch.Generator().manual_seed(0)
    prompts = {slot: 0.3 * torch.randn(n, base.d_embedding, generator=generator) for slot, n in ((0, 3), (1, 5))}

    class Prompts(NoEdits):
        def segments(self) -> Sequence[Segment]:
            return [Segment(p, slot) for slot, p in prompts.items()]

    rows = encoded(LABELS["several tokens"], "The same beginning for every row of them.\n")
    for slots in ((0, 1, BARE, 1, 0, 0), (1,) * 6, (BARE,) * 6):
        with base.bind(Prompts()):
            got = choice_log_likelihoods(base, rows, slots=slots)
        for r, slot, scores in zip(rows, slots, got, strict=True):
            wanted = [stock_log_likelihood(model, r.context, c, prompts.get(slot)) for c in r.choices]
            assert scores == pytest.approx(wanted, rel=1e-4, abs=2e-4)


def test_a_context_is_packed_once_however_many_answers_follow() -> None:
    rows = encoded(LABELS["twenty"])
    packed = scoring_batch(rows)
    answers = sum(len(c) - 1 for r in rows for c in r.choices)
    assert len(packed.batch.tokens_N) == sum(len(r.context) for r in rows) + answers
    assert packed.choices == (20,) * len(rows)


def test_every_row_is_scored_once_and_batches_keep_the_budget() -> None:
    rows = encoded(LABELS["several tokens"]) * 5
    for budget in (1, 100, 300, 10**6):
        batches = list(scoring_order(rows, budget))
        assert sorted(i for members in batches for i in members) == list(range(len(rows)))
        for members in batches:
            tokens = sum(len(rows[i].context) + sum(len(c) - 1 for c in rows[i].choices) for i in members)
            assert tokens <= budget or len(members) == 1


def test_no_rows_have_no_scores() -> None:
    assert choice_log_likelihoods(base_of("llama"), []) == []


def test_progress_counts_every_row_once() -> None:
    seen: list[int] = []
    rows = encoded(LABELS["one token each"])
    choice_log_likelihoods(base_of("llama"), rows, budget=60, progress=seen.append)
    assert len(seen) > 1
    assert sum(seen) == len(rows)


def test_scoring_keeps_no_graph() -> None:
    """A prompt that still trains: an evaluation in between must neither keep its graph nor change its state."""
    base = base_of("llama")
    prompt = torch.randn(2, base.d_embedding).requires_grad_(True)

    class Prompted(NoEdits):
        def segments(self) -> Sequence[Segment]:
            assert not torch.is_grad_enabled()
            return [Segment(prompt)]

    with base.bind(Prompted()):
        choice_log_likelihoods(base, encoded(LABELS["one token each"]))
    assert prompt.grad is None
    assert not base._stream.entered


def test_likelihoods_that_are_no_numbers_are_never_an_answer() -> None:
    """Among NaNs the first label would win every row."""
    base = base_of("llama")

    class Broken(NoEdits):
        def segments(self) -> Sequence[Segment]:
            return [Segment(torch.full((2, base.d_embedding), float("nan")))]

    with base.bind(Broken()), pytest.raises(Diverged, match="not finite"):
        choice_log_likelihoods(base, encoded(LABELS["one token each"]))


def test_the_oracle_itself_sums_over_answer_tokens() -> None:
    model = stock_of("llama")
    with torch.no_grad():
        logits = stock_logits(model, (5, 6, 7, 8)).double().log_softmax(-1)
    wanted = float(logits[1, 7] + logits[2, 8])
    assert stock_log_likelihood(model, (5, 6), (7, 8)) == pytest.approx(wanted, rel=1e-9)
