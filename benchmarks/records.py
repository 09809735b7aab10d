"""Where results go: one JSON line per measurement on standard output and in a file, under a line that says what was run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"


class Records:
    """Writes lines as they come, so that what was measured stays when a run is broken off. The first one is the header."""

    def __init__(self, script: str, out: Path | None) -> None:
        self.path = out or RESULTS / f"{script}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header = {
            "command": shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]]),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": machine.commit(),
            "processor": machine.processor(),
            "versions": machine.versions(),
        }
        self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def add(self, record: Mapping[str, Any]) -> None:
        """Print a record and keep it."""
        print(json.dumps(record), flush=True)
        self.note(record)

    def note(self, record: Mapping[str, Any]) -> None:
        """Keep a record without printing it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def say(text: str) -> None:
    """Progress, for a person: never on standard output, which holds JSON only."""
    print(text, file=sys.stderr, flush=True)
