"""Seeds that share passes over the base end as each does alone; a comparison that goes on trains them as it would have."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of
from tests.unit.test_comparison import task_of
from tests.unit.test_search import Heard
from tritune.errors import Diverged
from tritune.methods import method
from tritune.progress import Silent
from tritune.run import Training
from tritune.seeds import Trained, further
from tritune.trial import Trial

SEEDS = (1, 2, 3, 4)
METHODS = ["lora", "ptuning", "bottleneck", "prefix", "ia3"]


def trial(kind: str, seed: int, patience: int | None = None) -> Trial:
    training = Training(epochs=2, batch_tokens=60, evaluations=4, patience=patience)
    return Trial(base_of("qwen3"), task_of(), method(kind).Config(), training, 1e-2, seed)


def trained(kind: str, missing: Sequence[int], at_once: int, heard: Silent | None = None) -> dict[int, Trained]:
    runs = further(lambda seed: trial(kind, seed), SEEDS, missing, at_once, heard or Silent())
    return {run.trial.seed: run for run in runs}


def learned(run: Trained) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in run.trial.delta.export().items()}


@pytest.mark.parametrize("kind", METHODS)
def test_together_each_ends_as_it_does_alone(kind: str) -> None:
    heard = Heard()
    alone, together = trained(kind, SEEDS, 1), trained(kind, SEEDS, 3, heard)
    assert [run.beside for run in together.values()] == [2, 2, 2, 0]
    assert [run.peak_bytes is None for run in together.values()] == [True, True, True, False]
    assert heard.stages[0][0] == f"{kind}, seed 1, 2, 3"
    assert heard.steps == sum(total for _, total in heard.stages)
    for seed in SEEDS:
        got, want = together[seed].trial, alone[seed].trial
        assert got.best_step == want.best_step
        assert [p.step for p in got.curve] == [p.step for p in want.curve]
        for a, b in zip(got.curve, want.curve, strict=True):
            assert (a.rows, a.tokens, a.dev_score) == (b.rows, b.tokens, b.dev_score)
            assert (a.dev_loss or 0.0) == pytest.approx(b.dev_loss or 0.0, rel=1e-3)
        for name, tensor in learned(alone[seed]).items():
            torch.testing.assert_close(learned(together[seed])[name], tensor, rtol=5e-3, atol=1e-4, msg=name)
    assert any(
        not torch.equal(a, b) for a, b in zip(learned(alone[1]).values(), learned(alone[2]).values(), strict=True)
    )


@pytest.mark.parametrize("missing", [(2,), (1, 3), (4,)])
def test_one_that_is_missing_is_trained_with_the_neighbours_it_would_have_had(missing: Sequence[int]) -> None:
    """To the bit: a comparison that was stopped shows the figures of one that was not."""
    straight, again = trained("lora", SEEDS, 3), trained("lora", missing, 3)
    assert tuple(again) == missing
    for seed in missing:
        for name, tensor in learned(straight[seed]).items():
            assert torch.equal(learned(again[seed])[name], tensor), name


def test_where_none_is_missing_nothing_is_made() -> None:
    def forbidden(seed: int) -> Trial:
        raise AssertionError(seed)

    assert not list(further(forbidden, SEEDS, (), 3, Silent()))


def test_runs_that_replace_weights_of_the_base_go_one_after_another() -> None:
    runs = trained("full", (1, 3, 4), 3)
    assert [(seed, run.beside) for seed, run in runs.items()] == [(1, 0), (3, 0), (4, 0)]
    assert all(run.peak_bytes for run in runs.values())


def test_one_that_diverges_is_named_when_its_neighbours_are_there() -> None:
    def spoiled(seed: int) -> Trial:
        made = trial("lora", seed)
        if seed == 2:
            with torch.no_grad():
                next(iter(made.delta.trainable().values())).fill_(float("nan"))
        return made

    heard = Heard()
    runs = further(spoiled, SEEDS, SEEDS, 3, heard)
    assert [next(runs).trial.seed, next(runs).trial.seed] == [1, 3]
    assert [line.startswith("lora, seed 2 diverged. ") for line in heard.said] == [True]
    with pytest.raises(Diverged, match="lora, seed 2: "):
        next(runs)


def test_one_that_stops_early_leaves_the_others_alone() -> None:
    runs = list(further(lambda seed: trial("lora", seed, patience=1 if seed == 2 else None), SEEDS, SEEDS, 4, Silent()))
    alone = trained("lora", (1, 3), 1)
    steps = {run.trial.seed: run.trial.curve[-1].step for run in runs}
    assert steps[1] == steps[3] == alone[1].trial.curve[-1].step
    assert steps[2] <= steps[1]
    for run in runs:
        if run.trial.seed in alone:
            assert run.trial.best_step == alone[run.trial.seed].trial.best_step
