"""Prefix tuning: where it starts, behind a shared beginning, beside prompts in one batch."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import base_of, packed_logits, rows_of, stock_logits, stock_of
from tests.unit.methods.test_placement import PLACED, moved, rows
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.methods import method_of
from tritune.methods.base import Bank, Delta
from tritune.methods.prefix import Prefix
from tritune.models.base import BARE, NoEdits
from tritune.models.tiny import CONFIGS
from tritune.text.pack import WORTH_SHARING, training_batch
from tritune.train.loop import batch_loss


@pytest.mark.parametrize("hidden", [None, 6], ids=["direct", "network"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_prefix_that_starts_from_words_answers_as_if_they_stood_there(name: str, hidden: int | None) -> None:
    base, model = base_of(name), stock_of(name)
    config = Prefix(tokens=5, hidden=hidden, start="text", text="good")
    delta = method_of(config).init(config, base, torch.Generator().manual_seed(0)).eval()
    words = base.tokenizer("goodg", add_special_tokens=False)["input_ids"]
    assert len(words) == 5, "bytes: the text is repeated up to the number of tokens"
    given = rows_of((9, 1, 14, 5))
    with base.bind(delta):
        packed = packed_logits(base, given)
    for row, logits in zip(given, packed, strict=True):
        torch.testing.assert_close(logits, stock_logits(model, [*words, *row])[len(words) :], rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_shared_beginning_behind_a_prefix_changes_no_number(name: str) -> None:
    """One batch whose common instruction is shared against every row alone, where nothing is."""
    base = base_of(name)
    given = rows(5, common=WORTH_SHARING)
    results = []
    for parts in ([given], [[row] for row in given]):
        delta = moved(Prefix(tokens=3), base)
        with base.bind(delta):
            losses = [batch_loss(base, training_batch(part)) for part in parts]
            torch.stack(losses).sum().backward()
        results.append((sum(float(loss.detach()) for loss in losses), delta.trainable()["table"].grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert results[0][1] is not None
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_bank_of_prefixes_and_prompts_answers_each_row_as_alone(name: str) -> None:
    base = base_of(name)
    deltas: dict[int, Delta] = {i: moved(config, base, i) for i, config in enumerate(PLACED.values())}
    deltas |= {3: moved(Prefix(tokens=2), base, 3), 4: moved(Prefix(tokens=5), base, 4)}
    given = rows(9)
    alone = {}
    for slot, edits in {**deltas, BARE: NoEdits()}.items():
        with base.bind(edits):
            alone[slot] = choice_log_likelihoods(base, given)
    slots = [3, 0, 4, 1, BARE, 2, 3, 4, 0]
    with base.bind(Bank(deltas)):
        got = choice_log_likelihoods(base, given, slots=slots)
    for i, slot in enumerate(slots):
        assert got[i] == pytest.approx(alone[slot][i], rel=1e-4, abs=2e-4)
