"""A prompt table: tasks share an encoder while they learn, and what is finished is never touched again."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import base_of, packed_logits, rows_of
from tests.unit.methods.test_placement import rows
from tritune.errors import Mismatch
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.methods.base import Bank
from tritune.methods.prompt_table import PromptTable
from tritune.methods.ptuning import METHOD, PTuning
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.text.pack import training_batch
from tritune.train.loop import batch_loss, train

CONFIG = PTuning(tokens=3, hidden=6)
QUICK = Training(epochs=2, batch_tokens=60, evaluations=0)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learn(base: Base, table: PromptTable, task: str, seed: int) -> None:
    list(train(QUICK, base, table.open[task], rows(6), learning_rate=1e-2, seed=seed))


def test_new_tasks_learn_with_the_same_encoder_and_leave_old_ones_alone() -> None:
    base = base_of("llama")
    table = PromptTable(CONFIG, base, rng(0))
    table.add("first", rng(1))
    learn(base, table, "first", 1)
    first = table.finish("first")["prompt"]
    encoder = {name: t.clone() for name, t in table.encoder.state_dict().items()}
    second = table.add("second", rng(2))
    began = second.export()["prompt"]
    assert not torch.equal(began, second.start), "the encoder brings along what it learned"  # type: ignore[arg-type]
    learn(base, table, "second", 2)
    assert any(not torch.equal(t, encoder[name]) for name, t in table.encoder.state_dict().items())
    assert not torch.equal(table.finish("second")["prompt"], began)
    assert torch.equal(table.export("first")["prompt"], first)


def test_a_finished_task_is_an_ordinary_adaptation() -> None:
    base = base_of("gemma2")
    table = PromptTable(CONFIG, base, rng(0))
    delta = table.add("task", rng(1))
    learn(base, table, "task", 1)
    with torch.no_grad(), base.bind(delta.eval()):
        wanted = packed_logits(base, rows_of((5, 9)))
    loaded = METHOD.load(CONFIG, base, table.finish("task"))
    with torch.no_grad(), base.bind(loaded):
        for got, want in zip(packed_logits(base, rows_of((5, 9))), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_tasks_in_one_batch_give_the_encoder_the_sum_of_their_gradients(placement: str) -> None:
    base = base_of("llama")
    table = PromptTable(CONFIG.model_copy(update={"start": "random", "placement": placement}), base, rng(0))
    deltas = {0: table.add("a", rng(1)), 1: table.add("b", rng(2))}
    given, slots = rows(6), (0, 1, 1, 0, 1, 0)
    with base.bind(Bank(deltas)):
        batch_loss(base, training_batch(given, slots)).backward()
    together = {n: p.grad.clone() for n, p in table.encoder.named_parameters() if p.grad is not None}
    table.encoder.zero_grad()
    for slot, delta in deltas.items():
        with base.bind(delta):
            mine = [row for row, own in zip(given, slots, strict=True) if own == slot]
            batch_loss(base, training_batch(mine)).backward()
    assert together.keys() == dict(table.encoder.named_parameters()).keys()
    for name, parameter in table.encoder.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_table_that_was_put_away_goes_on() -> None:
    base = base_of("llama")
    table = PromptTable(CONFIG, base, rng(0))
    table.add("old", rng(1))
    learn(base, table, "old", 1)
    table.finish("old")
    table.add("open", rng(2))
    learn(base, table, "open", 2)
    again = PromptTable(CONFIG, base, rng(9))
    again.restore({name: t.clone() for name, t in table.state().items()})
    learn(base, table, "open", 3)
    learn(base, again, "open", 3)
    for task in ("old", "open"):
        if task == "open":
            table.finish(task)
            again.finish(task)
        assert torch.equal(table.export(task)["prompt"], again.export(task)["prompt"])


def test_what_a_table_cannot_do_is_said() -> None:
    base = base_of("llama")
    with pytest.raises(Mismatch, match="encoder"):
        PromptTable(PTuning(encoder="none"), base, rng(0))
    table = PromptTable(CONFIG, base, rng(0))
    table.add("a", rng(1), text="words of the task")
    with pytest.raises(Mismatch, match="already"):
        table.add("a", rng(1))
    table.finish("a")
    with pytest.raises(Mismatch, match="already"):
        table.add("a", rng(1))


def test_tasks_with_words_of_their_own_start_there() -> None:
    base = base_of("llama")
    table = PromptTable(CONFIG, base, rng(0))
    words = base.tokenizer("yes", add_special_tokens=False)["input_ids"]
    prompt = table.add("a", rng(1), text="yes").export()["prompt"]
    torch.testing.assert_close(prompt, base.embedding(torch.tensor(words)).detach())
    with base.bind(table.open["a"].eval()):
        assert len(choice_log_likelihoods(base, rows(2))) == 2
