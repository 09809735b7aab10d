"""Eight LoRAs trained at once against the same eight one after another, time and memory; 128 tokens each in every step, or
another number.

Both sides do all the work of a run (drawing the adaptations, optimizer, clipping) through the package's own loops, each in
a process of its own, in turn. One after another, no more than one adaptation is held at a time: that side's peak memory is
that of one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from benchmarks.protocol import Outcome, Row, Setup, Spec, read_rows
from benchmarks.runner import in_turn

if TYPE_CHECKING:
    from benchmarks.worker import Clock
from tritune.methods import method
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.text.encode import Encoded
from tritune.train.loop import train
from tritune.train.together import train_together
from tritune.train.trainer import Job

#: adaptations, and tokens of each in a step
EIGHT, TOKENS = 8, 128
#: timed runs of each side, and steps of a run
TURNS, STEPS = 3, 4
#: what the two sides are called
APART, TOGETHER = "one-after-another", "at-once"


def work(spec: Spec, clock: Clock, base: Base) -> Callable[[], None]:
    """A turn's one step is a whole short run of all eight."""
    rows = [Encoded(str(i), tuple(r.context), tuple(r.target)) for i, r in enumerate(read_rows(Path(spec.rows)))]
    run = _at_once if spec.setup.loop == TOGETHER else _apart

    def go() -> None:
        clock.start()
        for members in spec.batches:
            clock.step(run(spec, base, [rows[i] for i in members]))

    return go


def _job(spec: Spec, base: Base, rows: Sequence[Encoded], i: int) -> Job:
    found = method(spec.method)
    delta = found.init(found.Config(**spec.config), base, torch.Generator().manual_seed(i))
    training = Training(epochs=1, batch_tokens=spec.setup.batch, evaluations=0)
    return Job(training, delta, rows, spec.learning_rate, i)


def _apart(spec: Spec, base: Base, rows: Sequence[Encoded]) -> float:
    losses = []
    for i in range(EIGHT):
        job = _job(spec, base, rows, i)
        events = list(train(job.training, base, job.delta, rows, learning_rate=job.learning_rate, seed=i))
        losses += [event.point.train_loss or 0.0 for event in events if event.kind == "step"]
    return sum(losses) / len(losses)


def _at_once(spec: Spec, base: Base, rows: Sequence[Encoded]) -> float:
    events = [event for _, event in train_together(base, [_job(spec, base, rows, i) for i in range(EIGHT)])]
    losses = []
    for event in events:
        if isinstance(event, Exception):
            raise event
        if event.kind == "step":
            losses.append(event.point.train_loss or 0.0)
    return sum(losses) / len(losses)


def measure(
    folder: Path,
    rows: Sequence[Row],
    rows_file: Path,
    *,
    tokens: int = TOKENS,
    turns: int = TURNS,
    steps: int = STEPS,
    threads: int | None = None,
) -> dict[str, Outcome]:
    """Both sides, `turns` times each after a first turn that warms up. `tokens`: of each adaptation in a step.

    Raises:
        RunFailed: a side ended badly.
    """
    mean = sum(row.tokens for row in rows) / len(rows)
    n = round(steps * tokens / mean)
    cuts = [range(*cut) for cut in pairwise(range(0, n * (turns + 2), n))]
    assert cuts[-1].stop <= len(rows), f"{cuts[-1].stop} rows are needed"
    config = method("lora")
    return in_turn(
        {
            side: Spec(
                setup=Setup("tritune", side, "default", "default", tokens, sort=True, tuned=True),
                method="lora",
                config={},
                folder=str(folder),
                rows=str(rows_file),
                turns=[[list(cut)] for cut in cuts],
                learning_rate=config.learning_rate,
            )
            for side in (APART, TOGETHER)
        },
        threads=threads,
    )


def ratios(outcomes: dict[str, Outcome]) -> dict[str, float]:
    """Time and peak memory at once, as a share of one after another, and of one alone."""
    seconds = {side: median(sum(turn) for turn in outcome.seconds[1:]) for side, outcome in outcomes.items()}
    return {
        "time_vs_alone": float(f"{seconds[TOGETHER] / seconds[APART]:.4g}"),
        "memory_vs_one": float(f"{outcomes[TOGETHER].peak_bytes / outcomes[APART].peak_bytes:.4g}"),
    }
