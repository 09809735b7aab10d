"""Freed memory is really kept: page faults of a second round tell. What the user has set stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tritune import process

PROGRAM = """
import resource, sys, torch
if sys.argv[1] == "kept":
    from tritune.process import keep_freed_memory
    if not keep_freed_memory():
        print("none"); raise SystemExit
else:  # large blocks are the system's; left as it is, glibc now and then keeps them by luck
    import ctypes
    ctypes.CDLL(None).mallopt(-3, 2**17)
def round():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1_000_000) for _ in range(20)]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
round(), round()
print(round())
"""

SETTLING = """
import sys
from tritune import process
process.settle = lambda: print("torch" in sys.modules)
from tritune.cli import main
main()
"""


def faults(how: str) -> str:
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_freed_memory_is_kept() -> None:
    kept = faults("kept")
    if kept == "none":
        pytest.skip("this C library has no such setting")
    assert int(kept) * 10 < int(faults("given back"))


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "keep_freed_memory", lambda: True)  # of this very process otherwise
    for name in process.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    process.settle()
    assert all(os.environ[name] == value for name, value in process.ENVIRONMENT.items())
    monkeypatch.setenv(name, "7")
    process.settle()
    assert os.environ[name] == "7"


def test_the_command_settles_before_torch_is_there() -> None:
    """How threads wait is read when torch is loaded, and never again."""
    run = subprocess.run([sys.executable, "-c", SETTLING, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0] == "False"
