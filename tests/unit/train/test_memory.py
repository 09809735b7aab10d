"""Old objects are left alone for the length of a run, and only so long; holes are given back every few steps."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from tritune.train.memory import tidied


class Ring:
    """An object in a circle: only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_circles_of_before_wait_and_those_made_since_do_not() -> None:
    old = Ring()
    seen = weakref.ref(old)
    with tidied():
        del old
        new = weakref.ref(Ring())
        gc.collect()
        assert seen() is not None
        assert new() is None
    gc.collect()
    assert seen() is None


def test_an_error_does_not_leave_them_frozen() -> None:
    with pytest.raises(KeyError), tidied():
        raise KeyError
    assert gc.get_freeze_count() == 0


#: of many tensors every second one goes: the holes are smaller than anything that is asked for next
HOLES = """
import torch
from pathlib import Path
from tritune.process import keep_freed_memory
from tritune.train.memory import SWEPT_EVERY, sweep, tidied
def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
if not keep_freed_memory():
    print("none"); raise SystemExit
kept = [torch.ones(250_000) for _ in range(200)]
del kept[::2]
for step in (1, SWEPT_EVERY - 1, SWEPT_EVERY):
    before = held(); sweep(step); print(before - held())
del kept[::2]
before = held()
with tidied():
    print(before - held())
"""


def test_holes_are_given_back_ahead_of_the_first_step_and_every_few() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    if run.stdout.strip() == "none":
        pytest.skip("this C library keeps nothing")
    first, last, swept, tidied_up = map(int, run.stdout.split())
    assert max(first, last) < 5e6
    assert swept > 80e6
    assert tidied_up > 40e6
