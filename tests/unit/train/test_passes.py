"""Passes: what is computed at once stays within the budget, and what is learned does not change by it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.laws.conftest import training_rows
from tests.oracles import base_of
from tritune.methods import method_of
from tritune.methods.base import Delta
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.methods.stack import Stack
from tritune.models.base import Batch
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.spec import MethodConfig
from tritune.train.batches import evenly
from tritune.train.loop import train
from tritune.train.passes import Passes
from tritune.train.together import train_together
from tritune.train.trainer import Job

BASE = "llama-tied"
ROWS = training_rows()
LENGTHS = [row.n_trained for row in ROWS]
#: all rows, but not all with forty tokens more
TIGHT = Training(epochs=4, batch_tokens=sum(LENGTHS), evaluations=0)
ROOMY = TIGHT.model_copy(update={"batch_tokens": 10**6})
BEHIND = PTuning(tokens=40, hidden=4, placement="suffix")


def fresh(config: MethodConfig) -> Delta:
    return method_of(config).init(config, base_of(BASE), torch.Generator().manual_seed(0))


def sizes_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every batch that a loss is taken of, from now on."""
    seen: list[int] = []
    loss = Base.loss

    def counted(self: Base, batch: Batch, *given: torch.Tensor) -> torch.Tensor:
        seen.append(sum(span.text is not None for span in batch.spans))
        return loss(self, batch, *given)

    monkeypatch.setattr(Base, "loss", counted)
    return seen


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 500))
def test_parts_are_even_and_no_larger_than_the_budget_asks(sizes: list[int], budget: int) -> None:
    members = list(range(len(sizes)))[::-1]
    parts = evenly(members, sizes, budget)
    assert [i for part in parts for i in part] == members, "every row once, in its order"
    assert len(parts) == 1 or sum(sizes) > budget, "nothing is divided that fits"
    whole = [sum(sizes[i] for i in part) for part in parts]
    assert max(whole) <= budget + max(sizes), "a part holds at most one row too many"
    assert max(whole) - min(whole) <= 2 * max(sizes)


@pytest.mark.parametrize(
    "config",
    [
        BEHIND,
        PTuning(tokens=41, encoder="none", placement="around", front=1),
        Stack.of([PTuning(tokens=40, encoder="none", placement="suffix"), LoRA(rank=2)]),
    ],
    ids=["suffix", "around", "suffix-with-lora"],
)
def test_a_step_in_several_passes_learns_what_one_pass_does(
    config: MethodConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = sizes_seen(monkeypatch)
    losses, states, passes = [], [], []
    for training in (ROOMY, TIGHT):
        delta = fresh(config)
        events = list(train(training, base_of(BASE), delta, ROWS, learning_rate=1e-2, seed=3))
        steps = [event for event in events if event.kind == "step"]
        assert [event.point.rows for event in steps] == [len(ROWS) * n for n in range(1, 5)]
        losses.append([event.point.train_loss for event in steps])
        states.append(delta.state())
        passes.append(seen[:])
        seen.clear()
    assert passes[0] == [len(ROWS)] * 4
    assert len(passes[1]) > 4
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-3), "something was learned"
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=2e-3, atol=2e-5)


def in_passes(config: MethodConfig, micro_batches: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    return list(Passes(fresh(config), ROWS, LENGTHS, budget).of(micro_batches))


def test_a_text_counts_only_where_something_is_kept_of_it() -> None:
    """Behind texts that nothing acts on, a row brings its prompt and its answer; with a LoRA its text as well."""
    whole = [list(range(len(ROWS)))]
    row = 40 + max(len(row.target) for row in ROWS) - 1
    assert in_passes(BEHIND, whole, len(ROWS) * row) == whole
    stacked = Stack.of([BEHIND, LoRA(rank=2)])
    assert len(in_passes(stacked, whole, len(ROWS) * row)) == 2
    assert in_passes(stacked, whole, sum(LENGTHS) + 40 * len(ROWS)) == whole


@pytest.mark.parametrize("config", [LoRA(rank=2), PTuning(tokens=40, hidden=4)], ids=["lora", "prefix"])
def test_without_tokens_behind_texts_a_micro_batch_stays_whole(config: MethodConfig) -> None:
    micro_batches = [[0, 3, 5], [7], [2, 1]]
    assert in_passes(config, micro_batches, 1) == micro_batches


def test_trained_at_once_they_go_in_passes_too() -> None:
    base = base_of(BASE)
    alone, together = ([fresh(BEHIND), fresh(LoRA(rank=2))] for _ in range(2))
    for delta in alone:
        list(train(TIGHT, base, delta, ROWS, learning_rate=1e-2, seed=3))
    list(train_together(base, [Job(TIGHT, delta, ROWS, 1e-2, 3) for delta in together]))
    for mine, wanted in zip(together, alone, strict=True):
        for name, tensor in wanted.state().items():
            torch.testing.assert_close(mine.state()[name], tensor, rtol=2e-3, atol=2e-5)
