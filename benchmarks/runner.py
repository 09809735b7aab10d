"""Starts measuring processes in the right environment and lets them work in turn. Knows the protocol; no method."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Self, TextIO

from benchmarks.protocol import READY, Outcome, Spec
from benchmarks.sides import ENVIRONMENTS, HERE
from tritune import process
from tritune.exchange.adapter_hub.older import with_older_config

ROOT = HERE.parent


class RunFailed(Exception):
    """A measuring process ended without an answer; holds the end of what it said."""


class Worker:
    """One side in a process of its own. A context; the process does not outlive it."""

    def __init__(self, spec: Spec, *, threads: int | None = None) -> None:
        self.spec, self.threads = spec, threads
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        library = self.spec.setup.library
        spec = self.spec
        if library == "adapters":  # its transformers would rotate positions otherwise
            (folder / "base").mkdir()
            spec = replace(spec, folder=str(with_older_config(Path(spec.folder), folder / "base")))
        spec.write(folder / "spec.json")
        self._log: TextIO = self._stack.enter_context((folder / "log").open("w+", encoding="utf-8"))
        ours = library == "tritune"
        python = sys.executable if ours else str(ENVIRONMENTS[library] / "bin" / "python")
        module = "benchmarks.ours" if ours else "benchmarks.peers.run"
        given = environment(self.threads)
        self._process = subprocess.Popen(
            [python, "-m", module, str(folder / "spec.json")],
            cwd=ROOT,
            env=process.environment(given) if ours else given,  # as the command does
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stack.close()

    def ready(self) -> None:
        """Wait until it is loaded, or has ended its turn.

        Raises:
            RunFailed: it ended.
        """
        if self._line() != READY:
            raise RunFailed(self._said())

    def go(self) -> None:
        """Begin the next turn."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def outcome(self) -> Outcome:
        """What it cost, after the last turn; returns when it has ended, and takes no time from the next one.

        Raises:
            RunFailed: it ended without saying so.
        """
        line = self._line()
        if not line.startswith("{"):
            raise RunFailed(self._said())
        self._process.wait()
        return Outcome.load(line)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _said(self) -> str:
        self._process.wait()
        self._log.seek(0)
        setup = self.spec.setup
        return (
            f"{setup.library} {setup.loop} {self.spec.method} ended with {self._process.returncode}:\n"
            + (self._log.read()[-3000:])
        )


def environment(threads: int | None) -> dict[str, str]:
    """What every process gets; tritune's own sources too, for the meter of memory."""
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return found if threads is None else found | {"OMP_NUM_THREADS": str(threads)}


def in_turn(specs: Mapping[str, Spec], *, threads: int | None = None) -> dict[str, Outcome]:
    """Let all sides do their turns, A B C, C B A, ...; each in its own process, one working at a time.

    Raises:
        RunFailed: a side ended before its time.
    """
    n_turns = {len(spec.turns) for spec in specs.values()}
    assert len(n_turns) == 1, "sides with different numbers of turns"
    n = n_turns.pop()
    with ExitStack() as stack:
        workers = {}
        for name, spec in specs.items():
            workers[name] = stack.enter_context(Worker(spec, threads=threads))
            workers[name].ready()
        outcomes = {}
        for turn in range(n):
            for name in list(workers) if turn % 2 == 0 else reversed(workers):
                workers[name].go()
                if turn < n - 1:
                    workers[name].ready()
                else:
                    outcomes[name] = workers[name].outcome()
        return {name: outcomes[name] for name in specs}
