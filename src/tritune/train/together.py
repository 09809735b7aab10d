"""Several adaptations trained in one pass over one frozen base: each has its own rows, rate, schedule, clipping and end.

In lock-step by optimizer steps: the next micro-batches of the runs are packed into batches, in which every row carries its
run's number as its slot: all into one, or as many as gain by sharing a pass. Each run equals itself trained alone up to
rounding, what it draws at random on a CPU included: every run has its own generator. (Dropout in bf16 draws more alone, for
tokens that nobody reads: `round_numbers.py`.) Knows no method.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from tritune.errors import Diverged, Mismatch, Problem
from tritune.methods.base import Bank
from tritune.models.base import IGNORE
from tritune.models.pretrained import Base
from tritune.text.pack import training_batch
from tritune.train.memory import sweep, tidied
from tritune.train.trainer import Event, Job, Trainer

#: tokens of several runs that go through the base at once: more gain no time (docs/performance.md), and take more memory. A
#: GPU, where launching kernels takes as long for many as for few, wants more of them; how many was not measured.
TOKENS, TOKENS_OF_GPU = {"cpu": 1024}, 16384


def train_together(
    base: Base, jobs: Sequence[Job], *, stop: Callable[[], bool] | None = None
) -> Iterator[tuple[int, Event | Diverged]]:
    """Train all; yields what happens, with the number of the job it happens to.

    A job whose loss or gradient is not finite ends with that error as its last event, its parameters as before that
    step; the others go on. Time that a step takes for all counts for each by its share of the tokens.

    Args:
        stop: asked after every step of all; True ends this call for all, to be gone on with.

    Raises:
        Mismatch: adaptations that replace weights of the base cannot share a pass over it.
    """
    replacing = [
        Problem(f"job {i}", "replaces weights of the base") for i, job in enumerate(jobs) if job.delta.weights()
    ]
    Mismatch.check("These adaptations cannot be trained in one pass.", replacing, "Train them one after another.")
    with tidied():
        yield from _all(base, {i: _Run(base, job) for i, job in enumerate(jobs)}, stop)


def _all(base: Base, runs: dict[int, _Run], stop: Callable[[], bool] | None) -> Iterator[tuple[int, Event | Diverged]]:
    stopped, rounds = False, 0
    while runs:
        for i in [i for i, run in runs.items() if stopped or not run.advance()]:
            for event in runs.pop(i).end(stopped):
                yield i, event
        for i, events in _round(base, runs):
            yield from ((i, event) for event in events)
            if isinstance(events[-1], Diverged):
                del runs[i]
        sweep(rounds := rounds + 1)
        stopped = bool(runs) and stop is not None and stop()


class _Run:
    """A trainer, what it does next, and its own random generator."""

    def __init__(self, base: Base, job: Job) -> None:
        self.trainer = Trainer(base, job)
        self.drawn = torch.get_rng_state()
        self._left = self.trainer.left()
        self.due: list[list[int]] = []
        self.loss = 0.0

    def advance(self) -> bool:
        """Whether there is a next step."""
        self.due = [] if self.trainer.over else next(self._left, [])
        self.loss = 0.0
        return bool(self.due)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        torch.set_rng_state(self.drawn)
        yield
        self.drawn = torch.get_rng_state()

    def alone(self) -> Event | Diverged:
        with self.trainer.base.bind(self.trainer.delta), self.drawing():
            try:
                return self.trainer.step(self.due)
            except Diverged as error:
                return error

    def after_step(self) -> list[Event]:
        if not self.trainer.looks_now:  # to bind is to hook hundreds of modules
            return []
        with self.trainer.base.bind(self.trainer.delta), self.drawing():
            return list(self.trainer.after_step())

    def end(self, stopped: bool) -> list[Event]:
        with self.drawing():
            return list(self.trainer.end(stopped))


class _Apart(Bank):
    """Each adaptation draws from its own run's generator."""

    def __init__(self, runs: Mapping[int, _Run]) -> None:
        super().__init__({i: run.trainer.delta for i, run in runs.items()})
        self.runs = runs

    def turn(self, slot: int) -> AbstractContextManager[None]:
        return self.runs[slot].drawing()


def _round(base: Base, runs: Mapping[int, _Run]) -> Iterator[tuple[int, list[Event | Diverged]]]:
    """One optimizer step of every run, with the evaluations that follow it."""
    taken = _step(base, runs) if len(runs) > 1 else None
    for i, run in list(runs.items()):
        event = run.alone() if taken is None else taken[i]
        yield i, [event, *([] if isinstance(event, Diverged) else run.after_step())]


def _step(base: Base, runs: Mapping[int, _Run]) -> dict[int, Event] | None:
    """All in one pass. None: something is not finite, and no parameter was touched; which run it is, each alone will tell
    (what is not finite may reach a neighbour by way of padding, zero times infinity)."""
    start = time.perf_counter()
    before = {i: run.drawn for i, run in runs.items()}
    for run in runs.values():
        run.trainer.delta.train()
    finite = _backward(base, runs)
    norms: dict[int, float] = {}
    if finite:
        for i, run in runs.items():
            with run.drawing():
                norms[i] = run.trainer.norm()
        finite = all(map(math.isfinite, norms.values()))
    if not finite:
        for i, run in runs.items():
            run.trainer.forget_gradients()
            run.drawn = before[i]
        return None
    shared = time.perf_counter() - start
    tokens = {i: run.trainer.tokens(run.due) for i, run in runs.items()}
    taken = {}
    for i, run in runs.items():
        mine = shared * tokens[i] / sum(tokens.values())
        taken[i] = run.trainer.take(run.due, run.loss, norms[i], time.perf_counter() - mine)
    return taken


def _backward(base: Base, runs: Mapping[int, _Run]) -> bool:
    """Leaves every run's gradients and loss; whether all losses are finite. Runs may have different numbers of
    micro-batches: the first ones go together, then the second ones, and so on."""
    for n in range(max(len(run.due) for run in runs.values())):
        for here in _passes({i: run for i, run in runs.items() if n < len(run.due)}, n, base.device.type):
            with base.bind(_Apart(here)):
                losses_S = _losses(base, here, n)
                for run, loss in zip(here.values(), losses_S.tolist(), strict=True):
                    run.loss += loss
                if not all(math.isfinite(run.loss) for run in here.values()):
                    return False
                losses_S.sum().backward()  # type: ignore[no-untyped-call]
    return True


def _passes(runs: Mapping[int, _Run], n: int, device: str) -> Iterator[dict[int, _Run]]:
    """Runs whose n-th micro-batches go through the base at once; their gradients are their own, so it is all the same to
    them. A micro-batch with more tokens than that goes alone."""
    here: dict[int, _Run] = {}
    left = most = TOKENS.get(device, TOKENS_OF_GPU)
    for i, run in runs.items():
        tokens = run.trainer.tokens([run.due[n]])
        if here and tokens > left:
            yield here
            here, left = {}, most
        here[i] = run
        left -= tokens
    yield here


def _losses(base: Base, runs: Mapping[int, _Run], n: int) -> Tensor:
    """What the n-th micro-batch of each run adds to the loss of its step (S runs)."""
    rows = {i: [run.trainer.rows[r] for r in run.due[n]] for i, run in runs.items()}
    slots = [i for i, members in rows.items() for _ in members]
    batch = training_batch([row for members in rows.values() for row in members], slots)
    assert batch.labels_N is not None
    at_K = (batch.labels_N != IGNORE).nonzero()[:, 0]
    logits_KV = base.logits(batch, at_K)
    losses_K = F.cross_entropy(logits_KV, batch.labels_N[at_K].to(logits_KV.device), reduction="none")
    of_runs = torch.split(losses_K, [sum(len(row.target) for row in members) for members in rows.values()])
    return torch.stack(
        [of_run.sum() / run.trainer.targets(run.due) for of_run, run in zip(of_runs, runs.values(), strict=True)]
    )
