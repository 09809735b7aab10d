"""Prefix tuning: where it starts, behind a shared beginning, beside prompts in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of, logits_behind_keys, packed_logits, rows_of, stock_logits, stock_of
from tests.unit.methods.test_placement import PLACED, moved, rows
from tritune.errors import BadSettings
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.methods import method_of
from tritune.methods.base import Bank, Delta
from tritune.methods.prefix import Prefix
from tritune.models.base import BARE, IGNORE, NoEdits
from tritune.models.tiny import CONFIGS
from tritune.text.encode import Encoded
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


SUFFIX = Prefix(tokens=4, placement="suffix", cues=2)
#: families whose cache hides no key behind a window
WITHOUT_WINDOWS = [name for name in CONFIGS if name not in ("mistral", "gemma2", "gemma3", "phi3")]


def behind_keys(name: str, row: Encoded, answer: Sequence[int], learned: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of an answer, row by row, by transformers and its cache."""
    logits = logits_behind_keys(stock_of(name), row.context, answer[:-1], learned["prefix"], learned["cues"])
    return torch.log_softmax(logits, -1)[range(len(answer)), list(answer)].sum()


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
@pytest.mark.parametrize("common", [0, WORTH_SHARING])
def test_behind_a_text_loss_and_gradients_are_those_of_its_cache_with_more_in_it(name: str, common: int) -> None:
    base, given = base_of(name), rows(common=common)
    exported = moved(SUFFIX, base).export()
    learned = {part: tensor.clone().requires_grad_(True) for part, tensor in exported.items()}
    wanted = -torch.stack([behind_keys(name, row, row.target, learned) for row in given]).sum()
    gradients = dict(zip(learned, torch.autograd.grad(wanted, list(learned.values())), strict=True))
    plain = method_of(SUFFIX).load(SUFFIX, base, exported)
    with base.bind(plain):
        loss = batch_loss(base, training_batch(given))
        loss.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    got = {"prefix": plain.trainable()["table"].grad, "cues": plain.trainable()["cues"].grad}
    for part, gradient in gradients.items():
        assert got[part] is not None
        torch.testing.assert_close(got[part], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
@torch.no_grad()
def test_behind_a_text_every_answer_sees_the_same_keys(name: str) -> None:
    base, given = base_of(name), rows(common=WORTH_SHARING)
    delta = moved(SUFFIX, base)
    with base.bind(delta):
        got = choice_log_likelihoods(base, given)
    for row, scores in zip(given, got, strict=True):
        wanted = [float(behind_keys(name, row, choice, delta.export())) for choice in row.choices]
        assert scores == pytest.approx(wanted, rel=1e-4, abs=2e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_texts_that_are_remembered_change_no_number(name: str) -> None:
    """The same loss and gradients where texts are computed with what is learned, ahead of it, and not at all."""
    base, given = base_of(name), rows(common=WORTH_SHARING)
    batch = training_batch(given)
    assert batch.labels_N is not None
    at_K = (batch.labels_N != IGNORE).nonzero()[:, 0]
    texts = {row.context: (row.target[:-1],) for row in given}
    results = []
    for also, remembered in (([0], False), ([], False), ([], True), ([], True)):
        delta = moved(SUFFIX, base)
        with base.remembering(texts) if remembered else nullcontext(), base.bind(delta):
            for _ in range(1 + remembered):
                for parameter in delta.trainable().values():
                    parameter.grad = None
                logits = base.logits(batch, torch.cat([at_K, torch.tensor(also, dtype=torch.long)]))[: len(at_K)]
                logits.logsumexp(-1).sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in delta.trainable().items()}))
    for logits, gradients in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=1e-4, atol=2e-5)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][parameter], rtol=1e-3, atol=2e-5)


def test_cues_start_from_the_last_words_of_a_text() -> None:
    base = base_of("llama")
    config = Prefix(tokens=3, start="text", text="abc", placement="suffix", cues=2)
    cues = method_of(config).init(config, base, torch.Generator()).export()["cues"]
    words = base.tokenizer("bc", add_special_tokens=False)["input_ids"]
    assert torch.equal(cues, base.embedding(torch.tensor(words)).float())


def test_cues_go_with_suffix() -> None:
    with pytest.raises(BadSettings, match="cues"):
        Prefix(cues=2)
    assert Prefix(placement="suffix").n_cues == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_bank_of_prefixes_and_prompts_answers_each_row_as_alone(name: str) -> None:
    base = base_of(name)
    deltas: dict[int, Delta] = {i: moved(config, base, i) for i, config in enumerate(PLACED.values())}
    deltas |= {3: moved(Prefix(tokens=2), base, 3), 4: moved(Prefix(tokens=5), base, 4), 5: moved(SUFFIX, base, 5)}
    given = rows(9)
    alone = {}
    for slot, edits in {**deltas, BARE: NoEdits()}.items():
        with base.bind(edits):
            alone[slot] = choice_log_likelihoods(base, given)
    slots = [3, 0, 4, 5, BARE, 2, 5, 4, 1]
    with base.bind(Bank(deltas)):
        got = choice_log_likelihoods(base, given, slots=slots)
    for i, slot in enumerate(slots):
        assert got[i] == pytest.approx(alone[slot][i], rel=1e-4, abs=2e-4)
