"""The loop: what is kept, when it stops, what a saved state is good for, and what it leaves behind when it fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.laws.conftest import training_rows
from tests.oracles import base_of, stock_log_likelihood, stock_of
from tritune.errors import Diverged
from tritune.methods import METHODS, method
from tritune.methods.base import Delta
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.base import NoEdits
from tritune.run import Training
from tritune.spec import MethodConfig, Scope
from tritune.store.files import read_json, read_tensors, write_json, write_tensors
from tritune.train.loop import Event, Measured, total_steps, train
from tritune.train.state import Facts, TrainState

BASE = "llama-tied"
ROWS = training_rows()


def fresh(config: MethodConfig | None = None, seed: int = 0) -> Delta:
    config = config or LoRA(rank=2)
    kind = next(kind for kind in METHODS if isinstance(config, method(kind).Config))
    return method(kind).init(config, base_of(BASE), torch.Generator().manual_seed(seed))


def run(delta: Delta, training: Training, **options: object) -> list[Event]:
    return list(go(delta, training, **options))


def go(delta: Delta, training: Training, **options: object) -> Iterator[Event]:
    settings = {"learning_rate": 1e-2, "seed": 5, **options}
    return train(training, base_of(BASE), delta, ROWS, **settings)  # type: ignore[arg-type]


def into(states: list[TrainState]) -> Callable[[TrainState], None]:
    """Keeps every state that is saved."""
    return lambda state: states.append(state.kept())


def state_of(delta: Delta) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in delta.state().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Scripted:
    """A dev set whose scores are written down beforehand; keeps the weights of every look at it."""

    def __init__(self, delta: Delta, measured: Sequence[tuple[float, float]]) -> None:
        self.delta = delta
        self.left = list(measured)
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self) -> Measured:
        self.seen.append(state_of(self.delta))
        return Measured(*self.left.pop(0))


EIGHT = Training(epochs=8.0, batch_tokens=10**6, evaluations=4)
"""Eight steps of one batch, dev after each second one."""


# --- what happens, in which order ---


def test_events_come_in_order_and_count_rows_and_tokens() -> None:
    delta = fresh()
    events = run(delta, EIGHT, evaluate=Scripted(delta, [(0.1, 1.0)] * 4))
    kinds = [(e.kind, e.step) for e in events]
    wanted = []
    for step in range(1, 9):
        wanted.append(("step", step))
        if step % 2 == 0:
            wanted.append(("evaluation", step))
    assert kinds == [*wanted, ("done", 8)]
    assert all(e.total == 8 for e in events)
    tokens = sum(row.n_trained for row in ROWS)
    assert [e.point.rows for e in events if e.kind == "step"] == [12 * step for step in range(1, 9)]
    assert [e.point.tokens for e in events if e.kind == "step"] == [tokens * step for step in range(1, 9)]
    seconds = [e.point.seconds for e in events]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_the_first_loss_is_the_mean_over_answer_tokens_of_the_bare_base() -> None:
    first = run(fresh(), EIGHT.model_copy(update={"evaluations": 0}))[0]
    total = sum(stock_log_likelihood(stock_of(BASE), row.context, row.target) for row in ROWS)
    assert first.point.train_loss == pytest.approx(-total / sum(len(row.target) for row in ROWS), rel=1e-5)


def test_a_fraction_of_an_epoch_is_enough() -> None:
    training = Training(epochs=0.5, batch_tokens=30, evaluations=0)
    whole = total_steps(training.model_copy(update={"epochs": 1.0}), ROWS, 5)
    assert [e.kind for e in run(fresh(), training)].count("step") == math.ceil(whole / 2)


def test_without_rows_it_refuses_instead_of_searching_forever() -> None:
    with pytest.raises(AssertionError):
        list(train(EIGHT, base_of(BASE), fresh(), [], learning_rate=1e-2, seed=0))


def test_one_row_is_enough() -> None:
    events = list(train(EIGHT, base_of(BASE), fresh(), ROWS[:1], learning_rate=1e-2, seed=0))
    assert events[-1].kind == "done"
    losses = [e.point.train_loss for e in events if e.point.train_loss is not None]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("evaluations", [1, 3, 8, 50])
def test_dev_is_looked_at_as_often_as_asked_the_last_step_included(evaluations: int) -> None:
    delta = fresh()
    training = EIGHT.model_copy(update={"evaluations": evaluations})
    events = run(delta, training, evaluate=Scripted(delta, [(0.1, 1.0)] * 8))
    looked = [e.step for e in events if e.kind == "evaluation"]
    assert len(looked) == min(evaluations, 8)
    assert looked[-1] == 8


# --- the best is kept ---


@pytest.mark.parametrize(
    ("script", "best"),
    [
        ([(0.1, 3.0), (0.9, 2.0), (0.3, 1.0), (0.2, 1.0)], 1),
        ([(0.1, 3.0), (0.2, 2.0), (0.3, 1.0), (0.4, 9.0)], 3),
        ([(0.5, 3.0), (0.5, 2.0), (0.5, 2.5), (0.5, 2.0)], 1),
        ([(0.5, 1.0), (0.5, 1.0), (0.5, 1.0), (0.5, 1.0)], 0),
    ],
    ids=["a score in the middle", "the last", "of equal scores the lower loss", "of equal ones the first"],
)
@pytest.mark.parametrize("config", [LoRA(rank=2), PTuning(tokens=2, hidden=4)], ids=["lora", "ptuning"])
def test_the_best_step_on_dev_is_what_stays(config: MethodConfig, script: list[tuple[float, float]], best: int) -> None:
    delta = fresh(config)
    dev = Scripted(delta, script)
    events = run(delta, EIGHT, evaluate=dev)
    assert same(state_of(delta), dev.seen[best])
    assert all(not same(dev.seen[best], seen) for i, seen in enumerate(dev.seen) if i != best)
    flags = [e.best for e in events if e.kind == "evaluation"]
    assert flags == [i == 0 or (s, -loss) > max((a, -b) for a, b in script[:i]) for i, (s, loss) in enumerate(script)]
    assert not delta.training


def test_without_dev_the_last_step_stays() -> None:
    short, long = fresh(), fresh()
    run(short, EIGHT.model_copy(update={"schedule": "constant", "evaluations": 0}), until=5)
    events = run(long, EIGHT.model_copy(update={"schedule": "constant", "evaluations": 0}))
    assert events[-1].kind == "done"
    assert not same(state_of(short), state_of(long))


# --- stopping ---


def test_it_stops_when_dev_has_not_improved_for_long_enough() -> None:
    delta = fresh()
    dev = Scripted(delta, [(0.2, 1.0), (0.5, 1.0), (0.4, 1.0), (0.5, 1.0), (9.9, 1.0)])
    training = EIGHT.model_copy(update={"evaluations": 8, "patience": 2})
    events = run(delta, training, evaluate=dev)
    assert [(e.kind, e.step) for e in events[-3:]] == [("evaluation", 4), ("stopped", 4), ("done", 4)]
    assert "2" in events[-2].reason
    assert same(state_of(delta), dev.seen[1])


def test_a_new_best_starts_the_count_again() -> None:
    delta = fresh()
    script = [(0.2, 1.0), (0.1, 1.0), (0.3, 1.0), (0.1, 1.0), (0.4, 1.0), (0.1, 1.0), (0.1, 1.0), (9.0, 1.0)]
    events = run(delta, EIGHT.model_copy(update={"evaluations": 8, "patience": 2}), evaluate=Scripted(delta, script))
    assert [e.kind for e in events[-2:]] == ["stopped", "done"]
    assert events[-1].step == 7


def test_a_run_that_stopped_early_does_not_go_on_when_resumed() -> None:
    delta = fresh()
    dev = Scripted(delta, [(0.5, 1.0), (0.4, 1.0), (0.4, 1.0), *[(0.9, 0.1)] * 9])
    training = EIGHT.model_copy(update={"evaluations": 8, "patience": 2})
    states: list[TrainState] = []
    events = run(delta, training, evaluate=dev, save=into(states), until=6)
    assert events[-2].kind == "stopped"
    assert same(state_of(delta), dev.seen[0])
    again = fresh(seed=9)
    resumed = run(again, training, evaluate=dev, resume=states[-1])
    assert [(e.kind, e.step) for e in resumed] == [("done", 3)]
    assert same(state_of(again), dev.seen[0])


def test_a_state_beyond_the_step_to_stop_at_takes_no_step() -> None:
    states: list[TrainState] = []
    run(fresh(), EIGHT.model_copy(update={"evaluations": 0}), save=into(states), until=4)
    events = run(fresh(), EIGHT.model_copy(update={"evaluations": 0}), resume=states[-1], until=2)
    assert not [e for e in events if e.kind == "step"]


def test_asked_to_stop_it_stops_after_the_step_and_can_go_on() -> None:
    training = EIGHT.model_copy(update={"evaluations": 0})
    straight, other = fresh(), fresh()
    run(straight, training)
    states: list[TrainState] = []
    asked = iter([False, False, True])
    events = run(other, training, stop=lambda: next(asked), save=into(states))
    assert [(e.kind, e.step) for e in events] == [("step", 1), ("step", 2), ("step", 3)]
    last = fresh(seed=7)
    run(last, training, resume=states[-1])
    assert same(state_of(last), state_of(straight))


# --- numbers that are none ---


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_it() -> None:
    delta = fresh()
    before: dict[str, Tensor] = {}
    with pytest.raises(Diverged, match="step 3 is not finite"):
        for event in go(delta, EIGHT.model_copy(update={"evaluations": 0})):
            if event.step == 2:
                with torch.no_grad():
                    next(iter(delta.trainable().values())).fill_(float("inf"))
                before = state_of(delta)
    assert same(state_of(delta), before)
    assert all(p.grad is None for p in delta.trainable().values())
    assert_unbound()


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_that_is_not_finite_stops_before_the_step(clip: float | None) -> None:
    delta = fresh()
    last = list(delta.trainable().values())[-1]
    last.register_hook(lambda gradient: gradient * float("nan"))
    before = state_of(delta)
    with pytest.raises(Diverged, match="gradient of step 1"):
        run(delta, EIGHT.model_copy(update={"evaluations": 0, "clip": clip}))
    assert same(state_of(delta), before)
    assert all(p.grad is None for p in delta.trainable().values())
    assert_unbound()


def assert_unbound() -> None:
    with base_of(BASE).bind(fresh()):
        pass


def test_what_is_left_in_the_middle_leaves_the_base_free() -> None:
    events = go(fresh(), EIGHT.model_copy(update={"evaluations": 0}))
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert_unbound()


def test_an_evaluation_that_fails_leaves_the_base_free() -> None:
    def broken() -> Measured:
        raise RuntimeError("no dev today")

    with pytest.raises(RuntimeError, match="no dev today"):
        run(fresh(), EIGHT, evaluate=broken)
    assert_unbound()


# --- the same step, however it is cut ---


def test_accumulated_micro_batches_are_one_big_batch() -> None:
    """Answers of one to three tokens: a mean of means would be another number."""
    results = []
    for tokens, accumulate in ((10**6, 1), (20, 1000)):
        delta = fresh(PTuning(tokens=2, encoder="none"))
        training = Training(epochs=3.0, batch_tokens=tokens, accumulate=accumulate, evaluations=0)
        events = [e for e in run(delta, training, learning_rate=1e-2) if e.kind == "step"]
        assert len(events) == 3
        results.append(([e.point.train_loss for e in events], [e.gradient_norm for e in events], state_of(delta)))
    (loss_a, norm_a, state_a), (loss_b, norm_b, state_b) = results
    assert loss_a == pytest.approx(loss_b, rel=1e-4)
    assert norm_a == pytest.approx(norm_b, rel=1e-3)
    for name in state_a:
        torch.testing.assert_close(state_a[name], state_b[name], rtol=1e-3, atol=1e-3)


def test_clipping_bounds_the_step_but_tells_the_whole_norm() -> None:
    """The first moment of AdamW is a tenth of the gradient that reached it."""
    delta = fresh(PTuning(tokens=2, encoder="none"))
    saved: list[TrainState] = []
    tiny = EIGHT.model_copy(update={"clip": 1e-3, "evaluations": 0})
    event, *_ = go(delta, tiny, save=into(saved), until=1)
    (moment,) = (t for name, t in saved[-1].tensors.items() if name.endswith("/exp_avg"))
    assert float(moment.norm()) == pytest.approx(1e-4, rel=1e-2)
    assert event.gradient_norm > 1e-2


# --- determinism and resuming ---


@pytest.mark.parametrize(
    "config", [LoRA(rank=2, dropout=0.3), PTuning(tokens=2, encoder="lstm", hidden=4)], ids=["dropout", "lstm"]
)
def test_two_runs_are_equal_bit_for_bit_and_another_seed_is_not(config: MethodConfig) -> None:
    training = Training(epochs=2.0, batch_tokens=40, evaluations=0)
    states, losses = [], []
    for seed, noise in ((5, 1), (5, 2), (6, 3)):
        torch.manual_seed(noise)  # what the caller did before must not matter
        delta = fresh(config)
        losses.append([e.point.train_loss for e in run(delta, training, seed=seed)])
        states.append(state_of(delta))
    assert losses[0] == losses[1]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def through_disk(state: TrainState, folder: Path) -> TrainState:
    """As a command that saves a run and another process that reads it."""
    write_tensors(folder / "state.safetensors", state.tensors)
    write_json(folder / "facts.json", state.facts.model_dump(mode="json"))
    return TrainState(Facts.read(read_json(folder / "facts.json"), "facts"), read_tensors(folder / "state.safetensors"))


@pytest.mark.parametrize(
    "config",
    [LoRA(rank=2, dropout=0.3), PTuning(tokens=2, encoder="lstm", hidden=4), method("full").Config()],
    ids=["dropout", "lstm", "full"],
)
def test_a_state_goes_through_safetensors_and_goes_on_bit_for_bit(config: MethodConfig, tmp_path: Path) -> None:
    training = Training(epochs=3.0, batch_tokens=40, evaluations=3)
    stops = range(1, total_steps(training, ROWS, 5))

    def dev(delta: Delta) -> Callable[[], Measured]:
        return lambda: Measured(0.5, float(next(iter(delta.trainable().values())).detach().abs().sum()))

    straight = fresh(config)
    events = run(straight, training, evaluate=dev(straight))
    for stop in list(stops)[2::3]:
        first = fresh(config)
        states: list[TrainState] = []
        count = iter(range(1, 99))
        run(
            first,
            training,
            evaluate=dev(first),
            save=into(states),
            stop=lambda: next(count) == stop,  # noqa: B023
        )
        state = through_disk(states[-1], tmp_path)
        assert state.facts.step == stop
        second = fresh(config, seed=77)
        torch.manual_seed(991)
        rest = run(second, training, evaluate=dev(second), resume=state)
        assert not state.tensors, "a second copy of everything was held as long as the state was"
        assert same(state_of(second), state_of(straight))
        assert [(e.kind, e.step, e.point.train_loss, e.best) for e in rest] == [
            (e.kind, e.step, e.point.train_loss, e.best) for e in events if e.step > stop or (e.kind == "done")
        ]


def test_saving_does_not_disturb_the_run_and_states_are_independent_of_it() -> None:
    training = Training(epochs=2.0, batch_tokens=60, evaluations=3)
    plain, saved = fresh(), fresh()
    run(plain, training, evaluate=Scripted(plain, [(0.1, 1.0), (0.2, 1.0), (0.3, 1.0)]))
    kept: list[tuple[TrainState, dict[str, Tensor]]] = []

    def save(state: TrainState) -> None:
        kept.append((state.kept(), {name: t.clone() for name, t in state.tensors.items()}))

    run(saved, training, evaluate=Scripted(saved, [(0.1, 1.0), (0.2, 1.0), (0.3, 1.0)]), save=save)
    assert same(state_of(plain), state_of(saved))
    assert [state.facts.step for state, _ in kept][-1] == total_steps(training, ROWS, 5)
    for state, copy in kept:
        assert same(dict(state.tensors), copy), "training went on inside a saved state"


@pytest.mark.parametrize("kind", [k for k in METHODS if method(k).scope is Scope.ROW])
def test_a_state_holds_no_tensor_of_the_base(kind: str) -> None:
    base = {p.detach().numpy().tobytes() for p in base_of(BASE).parameters().values()}
    for config in method(kind).variants:
        states: list[TrainState] = []
        run(
            fresh(config),
            EIGHT.model_copy(update={"evaluations": 0}),
            until=1,
            save=into(states),
        )
        tensors = states[-1].tensors
        assert not base & {t.numpy().tobytes() for t in tensors.values() if t.dtype is torch.float32}
        learned = sum(t.numel() for name, t in tensors.items() if name.startswith("delta/"))
        assert learned < sum(p.numel() for p in base_of(BASE).parameters().values())


def test_a_state_is_plain_data() -> None:
    delta = fresh()
    states: list[TrainState] = []
    run(delta, EIGHT, evaluate=Scripted(delta, [(0.1, 1.0)] * 4), save=into(states))
    groups = {name.split("/")[0] for name in states[-1].tensors}
    assert groups == {"delta", "optimizer", "best", "rng"}
    json.dumps(states[-1].facts.model_dump(mode="json"))
    assert len(states[-1].facts.curve) == 12


def test_a_state_of_another_delta_is_refused() -> None:
    states: list[TrainState] = []
    run(
        fresh(LoRA(rank=2)),
        EIGHT.model_copy(update={"evaluations": 0}),
        until=2,
        save=into(states),
    )
    with pytest.raises((RuntimeError, KeyError)):
        run(fresh(LoRA(rank=3)), EIGHT.model_copy(update={"evaluations": 0}), resume=states[-1])
    assert_unbound()


def test_dropout_is_off_while_dev_is_scored_and_on_while_training() -> None:
    delta = fresh(LoRA(rank=2, dropout=0.5))
    modes: list[tuple[str, bool]] = []

    def look() -> Measured:
        modes.append(("dev", delta.training))
        return Measured(0.1, 1.0)

    for event in go(delta, EIGHT, evaluate=look):
        if event.kind == "step":
            modes.append(("step", delta.training))
    assert {mode for kind, mode in modes if kind == "dev"} == {False}
    assert {mode for kind, mode in modes if kind == "step"} == {True}
    assert not base_of(BASE).model.training


def test_nothing_of_the_base_gets_a_gradient() -> None:
    run(fresh(), EIGHT.model_copy(update={"evaluations": 0}), until=2)
    assert all(p.grad is None and not p.requires_grad for p in base_of(BASE).parameters().values())
    assert isinstance(base_of(BASE)._stream.edits, NoEdits)
