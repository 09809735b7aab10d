"""For every test: one thread per process (tiny bases gain nothing from more, and two workers share two cores), no test that
fails because a machine is slow, and Ctrl-C as a terminal sends it: a shell that starts the suite in the background has it
ignored, and children inherit that."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("tritune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tritune")


@pytest.fixture(autouse=True, scope="session")
def no_search_for_garbage_before_every_run() -> Iterator[None]:
    """A run first has Python go through all objects, a quarter of a second where everything is imported. Once in a training
    that is nothing; the tests train thousands of times, and it was three quarters of what the laws took."""
    from tritune.train import memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "gc", SimpleNamespace(collect=int, freeze=gc.freeze, unfreeze=gc.unfreeze))
        yield
