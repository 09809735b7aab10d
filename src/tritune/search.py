"""The choice of a learning rate: every rate runs a share of the steps, and the best, paused, goes on from there.

Over a frozen base the rates share each pass; a method that replaces weights of the base runs them one after another, and
holds but two copies of these. Knows trials; no method by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tritune.errors import Diverged
from tritune.evaluate.record import CurvePoint, SearchPoint
from tritune.progress import Progress
from tritune.report.told import told
from tritune.train.state import TrainState
from tritune.trial import Trial, follow, follow_together


def choose(trials: Iterator[Trial], n: int, share: float, progress: Progress) -> tuple[Trial, tuple[SearchPoint, ...]]:
    """The leader, to be gone on with, and what each reached.

    Args:
        trials: `n` of them, fresh, that differ in their rate only, from the lowest to the highest. Made as they are needed.
        share: of all steps, for each.

    Raises:
        Diverged: none of the rates stayed finite.
    """
    first = next(trials)
    if n == 1:
        return first, ()
    steps = max(1, round(share * first.total_steps))
    if first.delta.weights():
        return _best(_one_by_one(first, trials, steps, progress), steps)
    return _best(_at_once([first, *trials], steps, progress), steps)


#: a trial and its state, None where it never came to one
Reached = tuple[Trial, TrainState | None]


def _one_by_one(first: Trial, others: Iterator[Trial], steps: int, progress: Progress) -> Iterator[Reached]:
    trial: Trial | None = first
    while trial is not None:
        states: list[TrainState] = []

        def keep(state: TrainState, states: list[TrainState] = states) -> None:
            states[:] = [state]  # the last one stays as it is, since the trial has paused; a copy may be gigabytes

        try:
            follow(trial.events(until=steps, save=keep), progress, _name([trial], progress), steps)
        except Diverged as error:
            states.clear()
            _say_diverged(trial, error, progress)
        yield trial, states.pop() if states else None
        trial = next(others, None)


def _at_once(trials: Sequence[Trial], steps: int, progress: Progress) -> Iterator[Reached]:
    """One stage for all; each line that stays names its own rate."""
    states: dict[int, TrainState] = {}

    def keep(trial: Trial, state: TrainState) -> None:
        states[id(trial)] = state  # lent, as above

    names = [_name([trial], progress) for trial in trials]
    together = follow_together(trials, names, _name(trials, progress), progress, until=steps, save=keep)
    for trial, error in together:
        states.pop(id(trial), None)
        _say_diverged(trial, error, progress)
    for trial in trials:
        yield trial, states.pop(id(trial), None)


def _best(reached: Iterator[Reached], steps: int) -> tuple[Trial, tuple[SearchPoint, ...]]:
    leader: Trial | None = None
    points: list[SearchPoint] = []
    for trial, state in reached:
        look = trial.latest if state else None
        points.append(
            SearchPoint(
                learning_rate=trial.learning_rate,
                steps=steps,
                dev_loss=look.dev_loss if look else None,
                dev_score=look.dev_score if look else None,
                chosen=False,
            )
        )
        if look and (leader is None or _lower(look, leader.latest)):
            if leader is not None:
                leader.resume = None
            trial.resume = state
            leader = trial
        del state
    if leader is None:
        raise Diverged(
            f"{trial.method.kind}: every learning rate of the search diverged: {[p.learning_rate for p in points]}."
        )
    chosen = leader.learning_rate
    return leader, tuple(p.model_copy(update={"chosen": p.learning_rate == chosen}) for p in points)


def _lower(one: CurvePoint, other: CurvePoint | None) -> bool:
    """By their loss on dev: after a share of the steps, on the few rows that dev often has, scores are mostly luck."""
    return other is None or (one.dev_loss or 0.0) < (other.dev_loss or 0.0)


def _name(trials: Sequence[Trial], progress: Progress) -> str:
    rates = ", ".join(f"{trial.learning_rate:.2g}" for trial in trials)
    return told("rate", progress.lang, method=trials[0].method.kind, rate=rates)


def _say_diverged(trial: Trial, error: Diverged, progress: Progress) -> None:
    rate = f"{trial.learning_rate:.2g}"
    progress.say(told("diverged", progress.lang, method=trial.method.kind, rate=rate, why=error))
