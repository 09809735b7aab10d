"""Memory while a run lasts, Python's and the C library's. Knows nothing of training but that it goes step by step.

Python's garbage collector is told to leave alone what was there before: transformers alone brings hundreds of thousands of
objects, and a training step makes enough new ones to have all looked through every few steps (a fifth of a second each time).
The C library keeps what is freed (`process.py`): what loading left, and ever more holes, as steps are of ever other sizes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from tritune.process import give_back

#: steps from one sweep to the next. One takes some 20 ms, and pages have to be got again.
SWEPT_EVERY = 8


@contextmanager
def tidied() -> Iterator[None]:
    """Inside, only objects made since are looked through; what is made and dropped is freed as ever. Memory that was freed
    before is given back, weights that were put aside included: enter it last."""
    gc.collect()
    gc.freeze()
    give_back()
    try:
        yield
    finally:
        gc.unfreeze()


def sweep(step: int) -> None:
    """After a step, the first of which is 1: every so many, holes of whole pages are given back."""
    if step % SWEPT_EVERY == 0:
        give_back()
