"""Python's garbage collector, told to leave alone what was there before a run: transformers alone brings hundreds of
thousands of objects, and a training step makes enough new ones to have all looked through every few steps (a fifth of a
second each time).

Knows nothing but the collector.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Inside, only objects made since are looked through. What is made and dropped is freed as ever."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
