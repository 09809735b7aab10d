"""tritune's side of a measurement, in a process of its own: the package's own base, method, packing and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import cast

if __name__ == "__main__":  # before torch and transformers are imported, as the command does
    from tritune.process import settle

    settle()

import torch

from benchmarks import flops, several
from benchmarks.protocol import Spec, read_rows
from benchmarks.worker import Clock, work
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.methods import method
from tritune.methods.base import Delta
from tritune.models.dtype import Dtype
from tritune.models.load import load_base
from tritune.models.past import Virtual
from tritune.models.pretrained import Base
from tritune.text.encode import Encoded
from tritune.text.pack import training_batch
from tritune.train.loop import batch_loss
from tritune.train.memory import sweep, tidied
from tritune.train.optim import AdamW, clipping
from tritune.train.passes import Passes


def prepare(spec: Spec, clock: Clock) -> Callable[[], None]:
    """Load the base, and make what the spec asks for."""
    dtype = None if spec.setup.dtype == "default" else cast("Dtype", spec.setup.dtype)
    base = load_base(spec.folder, dtype=dtype, device=spec.device, compiled=spec.setup.compiled)
    clock.dtype = base.dtype_name
    if spec.setup.loop in (several.APART, several.TOGETHER):
        return several.work(spec, clock, base)
    return (scoring if spec.choices else training)(spec, clock, base)


def scoring(spec: Spec, clock: Clock, base: Base) -> Callable[[], None]:
    """Log-likelihoods of every choice of every row, by the bare base."""
    choices = tuple(tuple(choice) for choice in spec.choices)
    rows = [Encoded(str(i), tuple(r.context), (), choices) for i, r in enumerate(read_rows(Path(spec.rows)))]

    def score() -> None:
        clock.start()
        for members in spec.batches:
            found = choice_log_likelihoods(base, [rows[i] for i in members])
            clock.step(-sum(map(sum, found)) / len(found) / len(choices))

    return score


def training(spec: Spec, clock: Clock, base: Base) -> Callable[[], None]:
    """A fresh adaptation, and the steps that train it."""
    rows = [Encoded(str(i), tuple(r.context), tuple(r.target)) for i, r in enumerate(read_rows(Path(spec.rows)))]
    found = method(spec.method)
    config = found.Config(**spec.config)
    torch.manual_seed(0)
    delta = found.init(config, base, torch.Generator().manual_seed(0))
    parameters = dict(delta.trainable())
    optimizer = AdamW(parameters, rests=delta.rests())
    passes = Passes(delta, rows, [row.n_trained for row in rows], spec.setup.batch)
    clock.flops = _flops(spec, base, rows, delta)

    texts = {row.context: (row.target[:-1],) for row in rows}

    def train() -> None:
        delta.train()
        keeping = base.remembering(texts) if spec.again else nullcontext()
        with keeping, base.bind(delta), base.without(delta.weights()), tidied():
            clock.start()
            for n, members in enumerate(spec.batches, 1):
                supervised = sum(len(rows[i].target) for i in members)
                loss = sum(_backward(base, [rows[i] for i in some], supervised) for some in passes.of([members]))
                optimizer.take(spec.learning_rate, clipping(optimizer.norm(), 1.0))
                sweep(n)
                clock.step(loss)

    return train


def _backward(base: Base, rows: list[Encoded], supervised: int) -> float:
    """As the package's own trainer does: the graph is gone when this returns."""
    loss = batch_loss(base, training_batch(rows)) / supervised
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def beside(delta: Delta) -> tuple[int, int]:
    """Virtual tokens that pass through the layers, and those whose keys and values are given."""
    with torch.no_grad():
        lengths = Virtual(delta.segments()).lengths
    totals = {kind: sum(of_slots.values()) for kind, of_slots in lengths.items()}
    return totals["front"] + totals["behind"], totals["deep"] + totals["deep_behind"]


def _flops(spec: Spec, base: Base, rows: list[Encoded], delta: Delta) -> list[int]:
    found = method(spec.method)
    config = found.Config(**spec.config)
    budget = found.budget(config, base)
    virtual, keys = beside(delta)
    shape = flops.Shape.of(base.config.to_dict())
    return [
        flops.step(
            shape,
            spec.method,
            flops.Work(
                lengths=[rows[i].n_trained for i in members],
                supervised=sum(len(rows[i].target) for i in members),
                added=budget.added_flops,
                virtual=virtual,
                keys=keys,
                encoder=budget.trained - budget.stored if virtual or keys else 0,
                cached=spec.again,
            ),
        )
        for members in spec.batches
    ]


if __name__ == "__main__":
    work(prepare)
