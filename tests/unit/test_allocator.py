"""Freed memory is really kept: page faults of a second round tell."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tritune import allocator

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


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: True)  # of this very process otherwise
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    allocator.settle()
    assert int(os.environ[name]) < 1024
    monkeypatch.setenv(name, "7")
    allocator.settle()
    assert os.environ[name] == "7"
