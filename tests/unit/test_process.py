"""Freed memory is really kept: page faults of a second round tell. What the user has set stays. The command starts over
once, with what glibc reads at its start, and remains the process that it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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

STARTS = """
import json, os, sys
print(json.dumps({"process": os.getpid(), "told": os.environ.get("GLIBC_TUNABLES"), "arguments": sys.argv,
                  "utf8": sys.flags.utf8_mode}), flush=True)
if "WATCHED" in os.environ:
    sys.setprofile(lambda *event: None)
sys.argv[1:] = sys.argv[2:]  # --version
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


def test_what_glibc_reads_at_its_start_is_added_to_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GPUS", ())
    monkeypatch.setattr(process, "_is_glibc", lambda: True)
    first, second = process.TUNABLES.items()
    told = "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=3"
    found = process.environment({"GLIBC_TUNABLES": told, "HOME": "/x", "GOMP_SPINCOUNT": "7"})
    assert found["GLIBC_TUNABLES"] == f"{told}:{second[0]}={second[1]}"
    assert (found["HOME"], found["GOMP_SPINCOUNT"]) == ("/x", "7")
    assert process.environment({})["GLIBC_TUNABLES"] == f"{'='.join(first)}:{'='.join(second)}"
    assert process.environment(found) == found, "a process that has them starts over no more"
    monkeypatch.setattr(process, "_is_glibc", lambda: False)
    assert "GLIBC_TUNABLES" not in process.environment({})


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """What an installed command looks like, telling at every start which process it is and what glibc was told."""
    (tmp_path / "tritune").write_text(STARTS)

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        given = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        call = [sys.executable, "-X", "utf8", str(tmp_path / "tritune"), "two words", "--version"]
        return subprocess.run(call, env=given | environment, capture_output=True, text=True, check=False)

    return run


def test_the_command_starts_over_once(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = command()
    assert run.returncode == 0, run.stderr
    starts = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if "GLIBC_TUNABLES" not in process.environment({}):
        pytest.skip("no glibc, or a GPU")
    assert [start["told"] for start in starts] == [None, process.environment({})["GLIBC_TUNABLES"]]
    before, after = ({name: value for name, value in start.items() if name != "told"} for start in starts)
    assert before == after
    assert after["utf8"] == 1
    assert after["arguments"][1:] == ["two words", "--version"]


def test_a_process_that_is_watched_stays(command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    run = command(WATCHED="1")
    assert run.returncode == 0, run.stderr
    assert sum(line.startswith("{") for line in run.stdout.splitlines()) == 1


def test_the_command_settles_before_torch_is_there() -> None:
    """How threads wait is read when torch is loaded, and never again."""
    run = subprocess.run([sys.executable, "-c", SETTLING, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0] == "False"
