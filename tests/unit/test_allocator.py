"""Freed memory is really kept: page faults of a second round tell."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from tritune.allocator import keep_freed_memory
    if not keep_freed_memory():
        print("none"); raise SystemExit
def round():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1_000_000) for _ in range(20)]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
round(), round()
print(round())
"""


def faults(how: str) -> str:
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_freed_memory_is_kept() -> None:
    kept = faults("kept")
    if kept == "none":
        pytest.skip("this C library has no such setting")
    assert int(kept) * 10 < int(faults("as it is"))
