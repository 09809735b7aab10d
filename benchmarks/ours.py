"""tritune's side of a measurement, in a process of its own: the package's own base, method, packing and optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from benchmarks import flops
from benchmarks.protocol import Spec, read_rows
from benchmarks.worker import Clock, work
from tritune.methods import method
from tritune.models.dtype import Dtype
from tritune.models.load import Base, load_base
from tritune.run import Training
from tritune.text.encode import Encoded
from tritune.text.pack import training_batch
from tritune.train.loop import batch_loss
from tritune.train.optim import adamw


def prepare(spec: Spec, clock: Clock) -> Callable[[], None]:
    """Load the base and make a fresh adaptation of it."""
    dtype = None if spec.setup.dtype == "default" else cast("Dtype", spec.setup.dtype)
    base = load_base(spec.folder, dtype=dtype, device=spec.device)
    rows = [Encoded(str(i), tuple(r.context), tuple(r.target)) for i, r in enumerate(read_rows(Path(spec.rows)))]
    found = method(spec.method)
    config = found.Config(**spec.config)
    training = Training(learning_rate=spec.learning_rate)
    torch.manual_seed(0)
    delta = found.init(config, base, torch.Generator().manual_seed(0))
    parameters = list(delta.trainable().values())
    optimizer = adamw(parameters, training)
    for group in optimizer.param_groups:
        group["lr"] = spec.learning_rate
    clock.dtype = base.dtype_name
    clock.flops = _flops(spec, base, rows)

    def train() -> None:
        delta.train()
        with base.bind(delta):
            clock.start()
            for members in spec.batches:
                chosen = [rows[i] for i in members]
                loss = batch_loss(base, training_batch(chosen)) / sum(len(row.target) for row in chosen)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                clock.step(loss.item())

    return train


def _flops(spec: Spec, base: Base, rows: list[Encoded]) -> list[int]:
    found = method(spec.method)
    config = found.Config(**spec.config)
    budget = found.budget(config, base)
    virtual = found.virtual_tokens(config)
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
                encoder=budget.trained - budget.stored if virtual else 0,
            ),
        )
        for members in spec.batches
    ]


if __name__ == "__main__":
    work(prepare)
