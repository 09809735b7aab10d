"""Several at once: each run equals itself trained alone, and what happens to one is nothing to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.laws.conftest import training_rows
from tests.oracles import base_of
from tritune.errors import Diverged, Mismatch
from tritune.methods import METHODS, method
from tritune.methods.base import Delta
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.full import Full
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.base import Batch
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.spec import MethodConfig
from tritune.train.loop import Event, Measured, train
from tritune.train.state import TrainState
from tritune.train.together import TOKENS, train_together
from tritune.train.trainer import Job

BASE = "llama-tied"
ROWS = training_rows()
#: sums of products in another order, through so many steps
TOLERANCE = {"rtol": 2e-3, "atol": 2e-5}


def fresh(config: MethodConfig, seed: int) -> Delta:
    kind = next(kind for kind in METHODS if isinstance(config, method(kind).Config))
    return method(kind).init(config, base_of(BASE), torch.Generator().manual_seed(seed))


def scripted(scores: Sequence[float]) -> Callable[[], Measured]:
    left = list(scores)
    return lambda: Measured(left.pop(0), 1.0)


def jobs(states: list[list[TrainState]]) -> list[Job]:
    """Methods, ranks, rates, seeds, rows and lengths differ; the second stops early, the third draws at random."""
    five = Training(epochs=3, batch_tokens=60, evaluations=3)
    given: list[tuple[MethodConfig, Training, int, float, list[float]]] = [
        (LoRA(rank=2), five, 12, 3e-3, [0.1, 0.3, 0.2]),
        (PTuning(tokens=3), five.model_copy(update={"patience": 1}), 12, 1e-2, [0.5, 0.4, 0.9]),
        (LoRA(rank=3, dropout=0.3), five.model_copy(update={"clip": 0.05}), 9, 1e-2, [0.1, 0.2, 0.3]),
        (Bottleneck(), five.model_copy(update={"accumulate": 2}), 7, 3e-3, [0.1, 0.1, 0.1]),
    ]
    return [
        Job(training, fresh(config, i), ROWS[:n], rate, i, scripted(scores), states[i].append)
        for i, (config, training, n, rate, scores) in enumerate(given)
    ]


def alone(job: Job) -> list[Event]:
    settings = {"learning_rate": job.learning_rate, "seed": job.seed, "evaluate": job.evaluate, "save": job.save}
    return list(train(job.training, base_of(BASE), job.delta, job.rows, until=job.until, **settings))  # type: ignore[arg-type]


def told(events: Sequence[Event]) -> list[tuple[str, int, int, bool]]:
    return [(e.kind, e.step, e.total, e.best) for e in events]


def same_tensors(got: TrainState, want: TrainState) -> None:
    assert got.tensors.keys() == want.tensors.keys()
    for name, tensor in want.tensors.items():
        torch.testing.assert_close(got.tensors[name], tensor, **TOLERANCE, msg=name)


@pytest.mark.parametrize("most", [10**6, 130, 1])
def test_each_equals_itself_trained_alone(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all share a pass, some do, or each has its own."""
    monkeypatch.setitem(TOKENS, "cpu", most)
    passes: list[tuple[int, int]] = []
    logits = Base.logits

    def seen(self: Base, batch: Batch, *args: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled() and batch.slots is not None:
            passes.append((len(batch.tokens_N), len(set(batch.slots))))
        return logits(self, batch, *args, **options)

    monkeypatch.setattr(Base, "logits", seen)
    apart: list[list[TrainState]] = [[] for _ in range(4)]
    together: list[list[TrainState]] = [[] for _ in range(4)]
    wanted = [alone(job) for job in jobs(apart)]
    events: list[list[Event]] = [[] for _ in range(4)]
    for i, event in train_together(base_of(BASE), jobs(together)):
        assert isinstance(event, Event)
        events[i].append(event)
    assert "stopped" in {e.kind for e in events[1]}
    for i in range(4):
        assert told(events[i]) == told(wanted[i])
        for got, want in zip(events[i], wanted[i], strict=True):
            got_loss, loss = got.point.train_loss, want.point.train_loss
            assert got_loss == (loss if loss is None else pytest.approx(loss, rel=1e-3))
            assert got.gradient_norm == pytest.approx(want.gradient_norm, rel=1e-2)
            assert (got.point.rows, got.point.tokens) == (want.point.rows, want.point.tokens)
        assert len(together[i]) == len(apart[i])
        for state, other in zip(together[i], apart[i], strict=True):
            same_tensors(state, other)
    assert all(tokens <= most or runs == 1 for tokens, runs in passes)
    assert max(runs for _, runs in passes) == {10**6: 4, 130: 3, 1: 1}[most]


def test_a_run_goes_on_alone_from_a_state_of_several() -> None:
    training = Training(epochs=4, batch_tokens=10**6, evaluations=0)
    whole = Job(training, fresh(LoRA(), 0), ROWS, 1e-2, 3)
    alone(whole)
    kept: list[TrainState] = []
    paused = Job(training, fresh(LoRA(), 0), ROWS, 1e-2, 3, save=lambda state: kept.append(state.kept()), until=2)
    other = Job(training, fresh(LoRA(), 1), ROWS, 1e-3, 4, until=2)
    assert [e.kind for _, e in train_together(base_of(BASE), [paused, other]) if isinstance(e, Event)] == ["step"] * 4
    list(train(training, base_of(BASE), paused.delta, ROWS, learning_rate=1e-2, seed=3, resume=kept[-1]))
    for name, tensor in whole.delta.state().items():
        torch.testing.assert_close(paused.delta.state()[name], tensor, **TOLERANCE, msg=name)


def test_one_that_diverges_leaves_the_others_as_they_are() -> None:
    training = Training(epochs=3, batch_tokens=10**6, evaluations=0)
    good, bad, also_good = (Job(training, fresh(LoRA(), i), ROWS, 1e-2, i) for i in range(3))
    with torch.no_grad():
        next(iter(bad.delta.trainable().values())).fill_(float("inf"))
    events = list(train_together(base_of(BASE), [good, bad, also_good]))
    assert [i for i, e in events if isinstance(e, Diverged)] == [1]
    assert [e.step for i, e in events if i == 0 and isinstance(e, Event) and e.kind == "step"] == [1, 2, 3]
    expected = Job(training, fresh(LoRA(), 0), ROWS, 1e-2, 0)
    alone(expected)
    for name, tensor in expected.delta.state().items():
        torch.testing.assert_close(good.delta.state()[name], tensor, **TOLERANCE, msg=name)


def test_stopping_stops_all_and_keeps_their_states() -> None:
    kept: list[list[TrainState]] = [[], []]
    training = Training(epochs=9, batch_tokens=10**6, evaluations=0)
    given = [Job(training, fresh(LoRA(), i), ROWS, 1e-2, i, save=kept[i].append) for i in range(2)]
    events = list(train_together(base_of(BASE), given, stop=lambda: True))
    assert [(i, e.step) for i, e in events if isinstance(e, Event)] == [(0, 1), (1, 1)]
    assert [states[-1].facts.step for states in kept] == [1, 1]


def test_what_replaces_the_base_is_refused() -> None:
    given = [Job(Training(), fresh(config, 0), ROWS, 1e-2, 0) for config in (LoRA(), Full())]
    with pytest.raises(Mismatch, match="job 1"):
        next(train_together(base_of(BASE), given))
