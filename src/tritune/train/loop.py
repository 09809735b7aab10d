"""The one training loop, for every method: a generator of events. No callbacks, no logger, no file.

What it needs from above is passed in as values: `evaluate` scores dev, `save` keeps a state. Knows deltas by what they
declare trainable, and by nothing else. The best step on dev is what the delta holds at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tritune.methods.base import Delta
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.text.encode import Encoded
from tritune.train.memory import sweep, tidied
from tritune.train.state import TrainState
from tritune.train.trainer import Event, Job, Measured, Trainer, batch_loss, total_steps

__all__ = ["Event", "Measured", "batch_loss", "total_steps", "train"]


def train(
    training: Training,
    base: Base,
    delta: Delta,
    rows: Sequence[Encoded],
    *,
    learning_rate: float,
    seed: int,
    evaluate: Callable[[], Measured] | None = None,
    save: Callable[[TrainState], None] | None = None,
    resume: TrainState | None = None,
    until: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Event]:
    """Train `delta` on `rows`; yields what happens. Deterministic on a CPU for a given seed.

    Args:
        evaluate: scores dev under the delta, which is bound meanwhile; called `training.evaluations` times.
        save: gets the whole state after each evaluation and at the end, to be written or copied (`TrainState.kept`) before
            it returns: training goes on in these tensors. The last one of a run that has paused may be kept as it is. None:
            nothing is kept.
        resume: a saved state of the same run, which goes on bit for bit as if never stopped. It is taken over:
            do not use it again.
        until: pause after this step: dev is looked at (which decides nothing unless it was due), the state is saved, the
            best is not restored.
        stop: asked after every step; True ends this call as `until` does, with no evaluation of its own.

    Raises:
        Diverged: a loss or gradient is not finite; parameters are as before that step.
    """
    job = Job(training, delta, rows, learning_rate, seed, evaluate, save, until)
    trainer = Trainer(base, job)
    if resume is not None:
        trainer.resume(resume)
        resume = None
    stopped = False
    with base.bind(delta), base.without(delta.weights()), tidied():
        for passes in trainer.left():
            yield trainer.step(passes)
            sweep(trainer.facts.step)
            yield from trainer.after_step()
            stopped = not trainer.over and stop is not None and stop()
            if trainer.over or stopped:
                break
    yield from trainer.end(stopped)
