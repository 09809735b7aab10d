"""One run in the making: its delta, optimizer, schedule, curve and best step. `loop.py` and `together.py` drive it.

Knows deltas by what they declare trainable, and by nothing else; knows no other run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from tritune.errors import Diverged
from tritune.evaluate.record import CurvePoint
from tritune.methods.base import Delta
from tritune.models.base import IGNORE, Batch
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.text.encode import Encoded
from tritune.text.pack import shared_beginning, training_batch
from tritune.train.batches import steps, steps_in
from tritune.train.graphs import Graphs, may_be_recorded
from tritune.train.optim import AdamW, clipping, rate
from tritune.train.passes import Passes
from tritune.train.state import Best, Facts, TrainState, copied, grouped


@dataclass(frozen=True, slots=True)
class Measured:
    """Dev, scored once: mean score (higher is better) and mean loss per row."""

    score: float
    loss: float


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened at optimizer step `step` of `total`. `point` goes into the learning curve."""

    kind: str  # "step", "evaluation", "stopped", "done"
    step: int
    total: int
    point: CurvePoint
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    best: bool = False
    reason: str = ""


def total_steps(training: Training, rows: Sequence[Encoded], seed: int) -> int:
    """Optimizer steps of a whole run."""
    return steps_in(training.epochs, _lengths(rows), training.batch_tokens, training.accumulate, seed)


def _lengths(rows: Sequence[Encoded]) -> list[int]:
    """Tokens that a row brings into a batch: what all rows begin with goes through the base once."""
    shared = shared_beginning([row.context for row in rows])
    return [row.n_trained - shared for row in rows]


def batch_loss(base: Base, batch: Batch) -> Tensor:
    """Sum of the cross-entropies of a packed batch's labels; the head runs on these positions only."""
    assert batch.labels_N is not None
    at_K = (batch.labels_N != IGNORE).nonzero()[:, 0]
    return base.loss(batch, at_K, batch.labels_N[at_K])


@dataclass(frozen=True, slots=True)
class Job:
    """What to train, on what, and how.

    Args:
        evaluate: scores dev under the delta, which is bound meanwhile; called `training.evaluations` times.
        save: gets the whole state after each evaluation and at the end, to be written or copied (`TrainState.kept`) before
            it returns: training goes on in these tensors. The last one of a run that has paused may be kept as it is. None:
            nothing is kept.
        until: pause after this step: dev is looked at (which decides nothing unless it was due), the state is saved, the
            best is not restored.
    """

    training: Training
    delta: Delta
    rows: Sequence[Encoded]
    learning_rate: float
    seed: int
    evaluate: Callable[[], Measured] | None = None
    save: Callable[[TrainState], None] | None = None
    until: int | None = None


class Trainer:
    """The moving parts of one run; a loop drives them: `left` steps, `after_step` each, `end`."""

    def __init__(self, base: Base, job: Job) -> None:
        assert job.rows, "nothing to train on"
        self.base, self.job = base, job
        self.training, self.delta, self.rows = job.training, job.delta, job.rows
        training, delta, rows, seed = job.training, job.delta, job.rows, job.seed
        self.parameters = dict(delta.trainable())
        self._passes = Passes(delta, rows, _lengths(rows), training.batch_tokens)
        with torch.no_grad():  # only whether there is one
            summed = training.accumulate > 1 or delta.penalty() is not None
        self.optimizer = AdamW(
            self.parameters, training.weight_decay, delta.rate_factors(), delta.rests(), summed=summed
        )
        self.total = total_steps(training, rows, seed)
        self.facts = Facts()
        self.curve: list[CurvePoint] = []
        self.best: dict[str, Tensor] = {}
        self.over = False  # patience is out
        torch.manual_seed(seed)  # dropout of adaptations draws from the global generator

    def resume(self, state: TrainState) -> None:
        """Go on from a state, of which nothing is left then: its tensors may be parts of a mapped file, which stays with the
        process as long as one of them does."""
        self.facts = state.facts
        self.curve = list(state.facts.curve)
        self.delta.restore(dict(state.given_up("delta")))
        self.optimizer.restore(state.given_up("optimizer"))
        self.best = {f"best/{name}": tensor.clone() for name, tensor in state.given_up("best")}
        torch.set_rng_state(state.tensors.pop("rng"))

    def state(self) -> TrainState:
        tensors = grouped("delta", self.delta.state()) | grouped("optimizer", self.optimizer.state()) | self.best
        facts = self.facts.model_copy(update={"curve": tuple(self.curve)})
        return TrainState(facts, tensors | {"rng": torch.get_rng_state()})

    @property
    def last(self) -> int:
        """The step this call ends with, if nothing ends it before."""
        return min(self.total, self.job.until or self.total)

    def left(self) -> Iterator[list[list[int]]]:
        """The steps to be taken, each a list of what goes through the base at once."""
        self.over = self.patience_is_out
        done = self.facts.step
        ahead = steps(
            _lengths(self.rows), self.training.batch_tokens, self.training.accumulate, self.job.seed, skip=done
        )
        due = islice(ahead, 0 if self.over else max(0, self.last - done))
        return (list(self._passes.of(micro_batches)) for micro_batches in due)

    def step(self, passes: Sequence[Sequence[int]]) -> Event:
        """One optimizer step.

        Raises:
            Diverged: the loss or the gradient is not finite; no parameter was touched.
        """
        start = time.perf_counter()
        self.delta.train()
        loss = self._backward(passes, self.targets(passes))
        norm = self.norm()
        if not math.isfinite(norm):
            self.forget_gradients()
            raise Diverged(
                f"The gradient of step {self.facts.step + 1} is not finite. The step was not taken. "
                "A lower learning rate usually helps."
            )
        return self.take(passes, loss, norm, start)

    def targets(self, passes: Sequence[Sequence[int]]) -> int:
        """Tokens that a step learns to say."""
        return sum(len(self.rows[i].target) for members in passes for i in members)

    def tokens(self, passes: Sequence[Sequence[int]]) -> int:
        return sum(self.rows[i].n_trained for members in passes for i in members)

    def norm(self) -> float:
        """The gradient's norm, once what is added to the loss of a step is in it."""
        penalty = self.delta.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        return self.optimizer.norm()

    def forget_gradients(self) -> None:
        self.optimizer.forget_gradients()

    def take(self, passes: Sequence[Sequence[int]], loss: float, norm: float, start: float) -> Event:
        """The step itself, with the gradients that are there. `start`: since when the run's time counts."""
        step = self.facts.step + 1
        learning_rate = rate(self.training, self.job.learning_rate, step, self.total)
        self.optimizer.take(learning_rate, clipping(norm, self.training.clip))
        self.facts = self.facts.model_copy(
            update={
                "step": step,
                "rows": self.facts.rows + sum(map(len, passes)),
                "tokens": self.facts.tokens + self.tokens(passes),
                "seconds": self.facts.seconds + time.perf_counter() - start,
            }
        )
        return self._event("step", train_loss=loss, learning_rate=learning_rate, gradient_norm=norm)

    def after_step(self) -> Iterator[Event]:
        """Dev, where it is due; `over` tells whether that ended the run."""
        job = self.job
        if job.evaluate is None or not self.looks_now:
            return
        self.delta.eval()
        take_in = self.evaluate if self.facts.step in _evaluation_steps(self.training, self.total) else self.look
        yield take_in(job.evaluate())
        if job.save and self.facts.step != self.last:
            job.save(self.state())
        if self.patience_is_out:
            self.over = True
            yield self._event("stopped", reason=f"no better on dev for {self.training.patience} evaluations")

    @property
    def looks_now(self) -> bool:
        """Whether dev is looked at after this step."""
        step, due = self.facts.step, _evaluation_steps(self.training, self.total)
        return self.job.evaluate is not None and (step in due or (self.job.until is not None and step == self.last))

    def end(self, stopped: bool = False) -> Iterator[Event]:
        """Keep the state; a run that is not to go on gets its best weights back. `stopped`: it is to."""
        self.delta.eval()
        if self.job.save:
            self.job.save(self.state())
        paused = (stopped or self.job.until is not None) and not self.over
        if not paused or self.facts.step == self.total:
            self.keep_best()
            yield self._event("done")

    def _backward(self, passes: Sequence[Sequence[int]], n_targets: int) -> float:
        """Leaves the gradients; returns the rows' loss. A penalty is no part of it, so that curves can be compared."""
        total = 0.0
        for members in passes:
            total += self._backward_of(members, n_targets)
            if not math.isfinite(total):
                ids = ", ".join(self.rows[i].id for i in members[:5])
                self.forget_gradients()
                raise Diverged(
                    f"The loss of step {self.facts.step + 1} is not finite (rows {ids}, ...). The step was not taken. "
                    "A lower learning rate usually helps."
                )
        return total

    def _backward_of(self, members: Sequence[int], n_targets: int) -> float:
        """One pass. Its graph is gone when this returns: what it holds would stand beside the next one's."""
        batch = training_batch([self.rows[i] for i in members])
        if self._graphs is not None:
            return self._graphs.backward(batch, n_targets)
        loss = batch_loss(self.base, batch) / n_targets
        value = float(loss.detach())
        if math.isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
        return value

    @cached_property
    def _graphs(self) -> Graphs | None:
        """What records steps, where that is wanted and can be."""
        wanted = self.base.cuda_graphs and self.base.recordable and may_be_recorded(self.delta)
        return Graphs(self.base, self.delta) if wanted else None

    def look(self, measured: Measured) -> Event:
        """An evaluation that decides nothing in this run."""
        return self._event("evaluation", dev=measured)

    def evaluate(self, measured: Measured) -> Event:
        """Take an evaluation in: a new best keeps a copy of the delta."""
        best = self.facts.best
        better = best is None or (measured.score, -measured.loss) > (best.score, -best.loss)
        if better:
            self.best = grouped("best", copied(self.delta.state()))
            best = Best(step=self.facts.step, score=measured.score, loss=measured.loss)
        self.facts = self.facts.model_copy(update={"best": best, "stale": 0 if better else self.facts.stale + 1})
        return self._event("evaluation", dev=measured, best=better)

    @property
    def patience_is_out(self) -> bool:
        patience = self.training.patience
        return patience is not None and self.facts.stale >= patience

    def keep_best(self) -> None:
        if self.best:
            self.delta.restore({name.removeprefix("best/"): tensor for name, tensor in self.best.items()})

    def _event(
        self,
        kind: str,
        *,
        train_loss: float | None = None,
        dev: Measured | None = None,
        learning_rate: float = 0.0,
        gradient_norm: float = 0.0,
        best: bool = False,
        reason: str = "",
    ) -> Event:
        facts = self.facts
        point = CurvePoint(
            step=facts.step,
            rows=facts.rows,
            tokens=facts.tokens,
            seconds=facts.seconds,
            train_loss=train_loss,
            dev_loss=dev.loss if dev else None,
            dev_score=dev.score if dev else None,
        )
        if kind in ("step", "evaluation"):
            self.curve.append(point)
        return Event(kind, facts.step, self.total, point, learning_rate, gradient_norm, best, reason)


def _evaluation_steps(training: Training, total: int) -> set[int]:
    n = training.evaluations
    return {round(total * (i + 1) / n) for i in range(n)} - {0}
