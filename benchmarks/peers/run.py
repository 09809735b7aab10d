"""A peer's side of a measurement, in a process and an environment of its own."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.protocol import Spec
from benchmarks.worker import Clock, work


def prepare(spec: Spec, clock: Clock) -> Callable[[], None]:
    """Whatever the spec names."""
    if spec.setup.library == "lm-eval":
        from benchmarks.peers import harness

        return harness.prepare(spec, clock)
    if spec.setup.loop == "own":
        from benchmarks.peers import bare

        return bare.prepare(spec, clock)
    from benchmarks.peers import trainer

    return (trainer.prepare_trl if spec.setup.loop == "trl" else trainer.prepare_trainer)(spec, clock)


if __name__ == "__main__":
    work(prepare)
