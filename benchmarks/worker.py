"""The frame of every measuring process, ours and theirs: load, then train turn by turn, as told on standard input.

    python -m benchmarks.ours SPEC        python -m benchmarks.peers.run SPEC

Says READY when it is loaded and after every turn, and waits for a line; last it writes what it cost. Between its turns
it sleeps while the other sides have theirs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.machine import matrix_rates, versions
from benchmarks.protocol import READY, Outcome, Spec
from tritune.measure import Cost, measured


@dataclass
class Clock:
    """Takes the time of every step and sleeps between turns; holds what a side reports.

    Args:
        steps: optimizer steps of each turn.
        channel: where turns are announced.
        wait: returns when the next turn may begin.
    """

    steps: list[int]
    channel: TextIO
    device: str = "cpu"
    wait: Callable[[], object] = sys.stdin.readline
    losses: list[float] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    dtype: str = ""
    seconds: list[list[float]] = field(default_factory=list)
    rates: list[dict[str, list[float]]] = field(default_factory=list)
    peak_bytes: int = 0
    _last: float = 0.0
    _cost: Cost = field(default_factory=Cost)
    _turn: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        """Just before the first step."""
        self._begin()

    def step(self, loss: float | None = None) -> None:
        """A step ended. A side that learns its loss later appends it itself."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[-1].append(now - self._last)
        self._last = now
        if loss is not None:
            self.losses.append(loss)
        if len(self.seconds[-1]) == self.steps[len(self.seconds) - 1]:
            self._end()

    def _begin(self) -> None:
        print(READY, file=self.channel, flush=True)
        self.wait()
        self.rates.append({name: [rate] for name, rate in matrix_rates(self.device).items()})
        self.seconds.append([])
        self._cost = self._turn.enter_context(measured(anew=False))  # without the matrices just multiplied
        self._last = time.perf_counter()

    def _end(self) -> None:
        self._turn.close()
        self.peak_bytes = max(self.peak_bytes, self._cost.peak_bytes)
        for name, rate in matrix_rates(self.device).items():
            self.rates[-1][name].append(rate)
        if len(self.seconds) < len(self.steps):
            self._begin()


#: loads what it needs, then returns the training itself: only that is measured
Prepare = Callable[[Spec, Clock], Callable[[], None]]


def work(prepare: Prepare) -> None:
    """Do what the file named by the first argument says; the last line of standard output is the outcome."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where they like
    spec = Spec.read(Path(sys.argv[1]))
    clock = Clock([len(turn) for turn in spec.turns], channel, spec.device)
    train = prepare(spec, clock)
    with measured():  # what loading left is given back
        train()
    assert [len(turn) for turn in clock.seconds] == clock.steps, "steps were lost or made up"
    outcome = Outcome(
        seconds=clock.seconds,
        losses=clock.losses,
        peak_bytes=clock.peak_bytes,
        matrix_rates=clock.rates,
        dtype=clock.dtype,
        threads=torch.get_num_threads(),
        versions=versions(),
        flops=clock.flops,
    )
    print(outcome.dump(), file=channel, flush=True)
