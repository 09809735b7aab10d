"""Rates tried in one pass choose as rates tried one after another do, and the leader goes on from the same state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.oracles import base_of
from tests.unit.test_comparison import task_of
from tritune.errors import Diverged
from tritune.methods import method
from tritune.progress import Silent
from tritune.run import Training
from tritune.search import _at_once, _best, _one_by_one, choose
from tritune.train.loop import Measured
from tritune.trial import Trial

RATES = (1e-3, 3e-2, 1e-1)
STEPS = 4


class Heard(Silent):
    def __init__(self) -> None:
        self.stages: list[tuple[str, float]] = []
        self.steps = 0.0
        self.said: list[str] = []

    def stage(self, name: str, total: float, unit: str) -> None:
        self.stages.append((name, total))

    def advance(self, amount: float, **figures: float | None) -> None:
        self.steps += amount

    def say(self, message: str) -> None:
        self.said.append(message)


def trials(kind: str, evaluations: int = 3) -> Iterator[Trial]:
    training = Training(epochs=2, batch_tokens=60, evaluations=evaluations)
    for rate in RATES:
        yield Trial(base_of("qwen3"), task_of(), method(kind).Config(), training, rate, 0)


@pytest.mark.parametrize("kind", ["lora", "ptuning", "bottleneck"])
def test_at_once_is_one_by_one(kind: str) -> None:
    heard = Heard()
    given = trials(kind)
    slow, slow_points = _best(_one_by_one(next(given), given, STEPS, Silent()), STEPS)
    fast, fast_points = _best(_at_once(list(trials(kind)), STEPS, heard), STEPS)
    assert fast.learning_rate == slow.learning_rate
    for got, want in zip(fast_points, slow_points, strict=True):
        assert (got.learning_rate, got.steps, got.chosen) == (want.learning_rate, want.steps, want.chosen)
        assert got.dev_score == want.dev_score
        assert got.dev_loss == pytest.approx(want.dev_loss, rel=1e-3)
    assert fast.resume is not None
    assert slow.resume is not None
    for name, tensor in slow.resume.tensors.items():
        torch.testing.assert_close(fast.resume.tensors[name], tensor, rtol=5e-3, atol=1e-4, msg=name)
    assert heard.stages == [(f"{kind}, rate 0.001, 0.03, 0.1", 3 * STEPS)]
    assert heard.steps == 3 * STEPS
    kinds = [[e.kind for e in trial.events()] for trial in (fast, slow)]
    assert kinds[0] == kinds[1]
    assert kinds[0][-1] == "done"


def test_a_method_that_replaces_the_base_runs_its_rates_one_after_another() -> None:
    heard = Heard()
    choose(trials("full"), len(RATES), 0.1, heard)
    assert len(heard.stages) == len(RATES)


def test_a_rate_that_diverges_is_said_and_left_behind() -> None:
    given, heard = list(trials("lora")), Heard()
    with torch.no_grad():
        next(iter(given[1].delta.trainable().values())).fill_(float("nan"))
    leader, points = _best(_at_once(given, STEPS, heard), STEPS)
    assert leader is not given[1]
    assert [p.dev_loss is None for p in points] == [False, True, False]
    assert [line.startswith("lora: rate 0.03 diverged.") for line in heard.said] == [True]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_rate_that_diverges_after_a_good_look_does_not_lead(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be gone on with from before, and diverge again."""
    given = list(trials("lora", evaluations=20))
    spoiled = given[1]
    looks: list[int] = []

    def look_and_break() -> Measured:
        looks.append(1)
        with torch.no_grad():
            next(iter(spoiled.delta.trainable().values())).fill_(float("nan"))
        return Measured(score=1.0, loss=0.0)

    monkeypatch.setattr(spoiled, "_evaluate", look_and_break)
    reached = _at_once(given, STEPS, Silent()) if at_once else _one_by_one(given[0], iter(given[1:]), STEPS, Silent())
    leader, points = _best(reached, STEPS)
    assert looks
    assert leader is not spoiled
    assert [p.dev_loss is None for p in points] == [False, True, False]


def test_where_all_diverge_there_is_nothing_to_choose() -> None:
    given = list(trials("lora"))
    for trial in given:
        with torch.no_grad():
            next(iter(trial.delta.trainable().values())).fill_(float("nan"))
    with pytest.raises(Diverged, match="every learning rate"):
        choose(iter(given), len(given), 0.5, Silent())


@pytest.mark.parametrize("scores", [(0.5, 0.9, 0.5), (0.9, 0.5, 0.9)])
def test_the_lowest_loss_leads_whatever_the_scores(scores: tuple[float, ...]) -> None:
    """A score on few rows after few steps is luck: 40 rows of 80 right, or 46."""
    reached = list(_at_once(list(trials("lora")), STEPS, Silent()))
    for (trial, _), score, loss in zip(reached, scores, (0.7, 0.4, 0.6), strict=True):
        latest = trial.latest
        assert latest is not None
        trial.curve[:] = [latest.model_copy(update={"dev_score": score, "dev_loss": loss})]
    leader, points = _best(iter(reached), STEPS)
    assert leader.learning_rate == RATES[1]
    assert [point.chosen for point in points] == [False, True, False]
