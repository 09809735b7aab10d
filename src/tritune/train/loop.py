"""The one training loop, for every method: a generator of events. No callbacks, no logger, no file.

What it needs from above is passed in as values: `evaluate` scores dev, `save` keeps a state. Knows deltas by what they
declare trainable, and by nothing else. The best step on dev is what the delta holds at the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from tritune.errors import Diverged
from tritune.evaluate.record import CurvePoint
from tritune.methods.base import Delta
from tritune.models.base import IGNORE, Batch
from tritune.models.load import Base
from tritune.run import Training
from tritune.text.encode import Encoded
from tritune.text.pack import shared_beginning, training_batch
from tritune.train.batches import steps, steps_in
from tritune.train.optim import adamw, rate, set_rate
from tritune.train.state import Best, Facts, TrainState, grouped, optimizer_tensors, restore_optimizer


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
    logits_KV = base.logits(batch, at_K)
    return F.cross_entropy(logits_KV, batch.labels_N[at_K].to(logits_KV.device), reduction="sum")


class _Trainer:
    """The moving parts of one run; `train` drives them."""

    def __init__(
        self, training: Training, peak: float, base: Base, delta: Delta, rows: Sequence[Encoded], seed: int
    ) -> None:
        self.training, self.peak, self.base, self.delta, self.rows, self.seed = training, peak, base, delta, rows, seed
        self.parameters = dict(delta.trainable())
        self.optimizer = adamw(self.parameters, training, delta.rate_factors())
        self.total = total_steps(training, rows, seed)
        self.facts = Facts()
        self.curve: list[CurvePoint] = []
        self.best: dict[str, Tensor] = {}
        torch.manual_seed(seed)  # dropout of adaptations draws from the global generator

    def resume(self, state: TrainState) -> None:
        """Go on from a state; its tensors are taken over, not copied."""
        self.facts = state.facts
        self.curve = list(state.facts.curve)
        self.delta.restore(state.group("delta"))
        restore_optimizer(self.optimizer, self.parameters, state.group("optimizer"))
        self.best = {f"best/{name}": tensor for name, tensor in state.group("best").items()}
        torch.set_rng_state(state.tensors["rng"])

    def state(self) -> TrainState:
        moments = optimizer_tensors(self.optimizer, self.parameters)
        tensors = grouped("delta", self.delta.state()) | grouped("optimizer", moments) | self.best
        facts = self.facts.model_copy(update={"curve": tuple(self.curve)})
        return TrainState(facts, tensors | {"rng": torch.get_rng_state()})

    def step(self, micro_batches: Sequence[Sequence[int]]) -> Event:
        """One optimizer step.

        Raises:
            Diverged: the loss or the gradient is not finite; no parameter was touched.
        """
        start = time.perf_counter()
        step = self.facts.step + 1
        rows = [self.rows[i] for members in micro_batches for i in members]
        n_targets = sum(len(row.target) for row in rows)
        loss = self._backward(micro_batches, n_targets, step)
        norm = self._clip(step)
        learning_rate = rate(self.training, self.peak, step, self.total)
        set_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.facts = self.facts.model_copy(
            update={
                "step": step,
                "rows": self.facts.rows + len(rows),
                "tokens": self.facts.tokens + sum(row.n_trained for row in rows),
                "seconds": self.facts.seconds + time.perf_counter() - start,
            }
        )
        return self._event("step", train_loss=loss, learning_rate=learning_rate, gradient_norm=norm)

    def _backward(self, micro_batches: Sequence[Sequence[int]], n_targets: int, step: int) -> float:
        """Leaves the gradients; returns the rows' loss. A penalty is no part of it, so that curves can be compared."""
        total = 0.0
        for members in micro_batches:
            loss = batch_loss(self.base, training_batch([self.rows[i] for i in members])) / n_targets
            total += float(loss.detach())
            if not math.isfinite(total):
                ids = ", ".join(self.rows[i].id for i in members[:5])
                self.optimizer.zero_grad(set_to_none=True)
                raise Diverged(
                    f"The loss of step {step} is not finite (rows {ids}, ...). The step was not taken. "
                    "A lower learning rate usually helps."
                )
            loss.backward()  # type: ignore[no-untyped-call]
        penalty = self.delta.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        return total

    def _clip(self, step: int) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise Diverged(
                f"The gradient of step {step} is not finite. The step was not taken. A lower learning rate usually helps."
            )
        if self.training.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.training.clip, torch.tensor(norm))
        return norm

    def look(self, measured: Measured) -> Event:
        """An evaluation that decides nothing in this run."""
        return self._event("evaluation", dev=measured)

    def evaluate(self, measured: Measured) -> Event:
        """Take an evaluation in: a new best keeps a copy of the delta."""
        best = self.facts.best
        better = best is None or (measured.score, -measured.loss) > (best.score, -best.loss)
        if better:
            self.best = grouped("best", self.delta.state())
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

    def event(self, kind: str, reason: str) -> Event:
        return self._event(kind, reason=reason)

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
        save: gets the whole state after each evaluation and at the end; None: nothing is kept.
        resume: a saved state of the same run, which goes on bit for bit as if never stopped. It is taken over:
            do not use it again.
        until: pause after this step: dev is looked at (which decides nothing unless it was due), the state is saved, the
            best is not restored.
        stop: asked after every step; True ends this call as `until` does, with no evaluation of its own.

    Raises:
        Diverged: a loss or gradient is not finite; parameters are as before that step.
    """
    assert rows, "nothing to train on"
    trainer = _Trainer(training, learning_rate, base, delta, rows, seed)
    if resume is not None:
        trainer.resume(resume)
        resume = None
    last = min(trainer.total, until or trainer.total)
    left = steps(_lengths(rows), training.batch_tokens, training.accumulate, seed, skip=trainer.facts.step)
    due = _evaluation_steps(training, trainer.total)
    paused = until is not None and not trainer.patience_is_out
    with base.bind(delta):
        for micro_batches in islice(left, 0 if trainer.patience_is_out else max(0, last - trainer.facts.step)):
            delta.train()
            yield trainer.step(micro_batches)
            if evaluate and trainer.facts.step in due | ({last} if until else set()):
                delta.eval()
                take_in = trainer.evaluate if trainer.facts.step in due else trainer.look
                yield take_in(evaluate())
                if save and trainer.facts.step != last:
                    save(trainer.state())
                if trainer.patience_is_out:
                    yield trainer.event("stopped", f"no better on dev for {training.patience} evaluations")
                    paused = False
                    break
            if stop is not None and stop():
                paused = True
                break
    delta.eval()
    if save:
        save(trainer.state())
    if not paused or trainer.facts.step == trainer.total:
        trainer.keep_best()
        yield trainer.event("done", "")


def _evaluation_steps(training: Training, total: int) -> set[int]:
    n = training.evaluations
    return {round(total * (i + 1) / n) for i in range(n)} - {0}
