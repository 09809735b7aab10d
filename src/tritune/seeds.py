"""Runs of one method to their ends, each with what it cost; seeds that follow the first one share passes over a frozen base.

As many run at once as the search had rates: the search has shown that there is memory for so many, and a comparison that is
stopped loses no more than these. Which seeds go together is the plan's alone, so one that goes on ends with the figures of
one that was never stopped. Knows trials; no method by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tritune.errors import Diverged
from tritune.measure import measured
from tritune.progress import Progress
from tritune.report.told import told
from tritune.trial import Trial, follow, follow_together


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that has ended. `beside`: how many others shared its passes, whose memory nobody can tell apart from its own:
    `peak_bytes` is None then."""

    trial: Trial
    peak_bytes: int | None
    beside: int = 0


def alone(trial: Trial, progress: Progress) -> Trained:
    """
    Raises:
        Diverged: a loss or gradient is not finite.
    """
    with measured() as cost:
        follow(trial.events(), progress, _name([trial], progress), trial.total_steps)
    return Trained(trial, cost.peak_bytes)


def further(
    trial_of: Callable[[int], Trial], seeds: Sequence[int], missing: Sequence[int], at_once: int, progress: Progress
) -> Iterator[Trained]:
    """The missing ones of these seeds, trained one after another or with their neighbours.

    Args:
        trial_of: a fresh trial of a seed, made as it is needed.
        missing: of `seeds`. Where one is, its neighbours are trained with it once more, as they were.

    Raises:
        Diverged: a loss or gradient is not finite; those beside it have been yielded.
    """
    for start in range(0, len(seeds), at_once):
        group = seeds[start : start + at_once]
        wanted = [seed for seed in group if seed in missing]
        if not wanted:
            continue
        first = trial_of(wanted[0])
        if len(group) > 1 and not first.delta.weights():
            yield from _together([first if seed == wanted[0] else trial_of(seed) for seed in group], wanted, progress)
            continue
        yield alone(first, progress)
        for seed in wanted[1:]:
            yield alone(trial_of(seed), progress)


def _together(trials: list[Trial], wanted: Sequence[int], progress: Progress) -> Iterator[Trained]:
    names = [_name([trial], progress) for trial in trials]
    beside, kind = len(trials) - 1, trials[0].method.kind
    diverged: dict[int, str] = {}
    for trial, error in follow_together(trials, names, _name(trials, progress), progress):
        diverged[trial.seed] = str(error)
        name = _name([trial], progress)
        progress.say(told("run_diverged", progress.lang, name=name, why=error))
    trials[:] = [trial for trial in trials if trial.seed in wanted and trial.seed not in diverged]
    while trials:
        yield Trained(trials.pop(0), None, beside)
    if lost := [seed for seed in wanted if seed in diverged]:
        raise Diverged(" ".join(f"{kind}, seed {seed}: {diverged[seed]}" for seed in lost))


def _name(trials: Sequence[Trial], progress: Progress) -> str:
    seeds = ", ".join(str(trial.seed) for trial in trials)
    return told("seed", progress.lang, method=trials[0].method.kind, seed=seeds)
