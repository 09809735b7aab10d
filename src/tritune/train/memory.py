"""Memory while a run lasts, Python's and the C library's. Knows nothing of training but that it goes step by step.

Python's garbage collector is told to leave alone what was there before: transformers alone brings hundreds of thousands of
objects, and a training step makes enough new ones to have all looked through every few steps (a fifth of a second each time).
The C library keeps what is freed (`process.py`), and steps of ever other sizes leave ever more holes in it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from tritune.process import give_back

#: steps from one sweep to the next. One takes some 20 ms, and pages have to be got again.
SWEPT_EVERY = 8


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Inside, only objects made since are looked through. What is made and dropped is freed as ever."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def sweep(step: int) -> None:
    """After a step, the first of which is 1: every so many, holes of whole pages are given back."""
    if step % SWEPT_EVERY == 0:
        give_back()
