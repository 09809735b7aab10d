"""How tritune's speed and memory change with one size at a time: random rows, its own side only.

    python -m benchmarks.scaling [--what batch_tokens length rank virtual_tokens labels rows threads several]

`rows` shows that the cost of a row does not depend on how many there are: encoding a file of so many rows, planning an
epoch over them, and some training steps, with the memory of each. `several`: eight adaptations at once against one after
another, so many tokens each. Every point is a process of its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import several
from benchmarks.protocol import Row, Setup, Spec, write_rows
from benchmarks.records import Records, say
from benchmarks.rows import synthetic
from benchmarks.runner import ROOT, environment, in_turn
from benchmarks.sides import ours
from tritune.methods import method
from tritune.models.locate import locate

BASE = "smollm2-135m"
VOCABULARY = 49152
TURNS = 3

#: what is varied -> its values
VALUES: dict[str, list[int]] = {
    "batch_tokens": [64, 128, 256, 512, 1024, 2048, 4096],
    "length": [16, 32, 64, 128, 256, 512],
    "rank": [1, 4, 8, 16, 64],
    "virtual_tokens": [1, 5, 20, 100],
    "labels": [2, 5, 20, 100],
    "rows": [1_000, 10_000, 100_000],
    "threads": [1, 2],
    "several": [128, 1024],
}


def training(rows: list[Row], rows_file: Path, batch: int, kind: str = "lora", **config: float | str) -> Spec:
    """Steps over equal rows, the same number in every turn."""
    per_step = max(1, batch // rows[0].tokens)
    steps = [list(range(at, at + per_step)) for at in range(0, per_step * (TURNS + 1), per_step)]
    return _spec(ours(batch), rows, rows_file, [[step] for step in steps], kind, dict(config))


def _spec(
    setup: Setup,
    rows: list[Row],
    rows_file: Path,
    turns: list[list[list[int]]],
    kind: str = "lora",
    config: dict[str, float | str] | None = None,
    choices: list[list[int]] | None = None,
) -> Spec:
    write_rows(rows, rows_file)
    rate = method(kind).learning_rate
    folder = str(locate(BASE).folder)
    return Spec(setup, kind, config or {}, folder, str(rows_file), turns, rate, choices=choices or [])


def point(what: str, value: int, rows_file: Path) -> Spec:
    """The run for one value: LoRA on rows of 32 tokens in steps of 1,024, but for what is varied."""
    length = value if what == "length" else 32
    batch = value if what == "batch_tokens" else 1024
    rows = synthetic((TURNS + 1) * max(1, batch // length), length, VOCABULARY)
    if what == "labels":
        draw = random.Random(0)
        choices = [[draw.randrange(VOCABULARY) for _ in range(2)] for _ in range(value)]
        turns = [[list(range(t * 32, (t + 1) * 32))] for t in range(TURNS + 1)]
        return _spec(ours(batch), rows, rows_file, turns, choices=choices)
    if what == "virtual_tokens":
        return training(rows, rows_file, batch, "ptuning", tokens=value)
    return training(rows, rows_file, batch, rank=value if what == "rank" else 8)


def measure(what: str, value: int, rows_file: Path) -> dict[str, Any]:
    """One point of a curve."""
    spec = point(what, value, rows_file)
    outcome = in_turn({"ours": spec}, threads=value if what == "threads" else None)["ours"]
    rows = synthetic(1, value if what == "length" else 32, VOCABULARY)
    n_rows = sum(map(len, spec.turns[-1]))
    seconds = median(sum(turn) for turn in outcome.seconds[1:])
    return {
        "what": what,
        "value": value,
        "tokens_per_second": n_rows * rows[0].tokens / seconds,
        "rows_per_second": n_rows / seconds,
        "turns": [sum(turn) for turn in outcome.seconds[1:]],
        "peak_bytes": outcome.peak_bytes,
        "matrix_rates": outcome.matrix_rates,
        "dtype": outcome.dtype,
        "threads": outcome.threads,
        "setup": asdict(spec.setup),
        "config": spec.config,
        "versions": outcome.versions,
    }


def many_rows(value: int, folder: Path) -> dict[str, Any]:
    """Reading, encoding and planning of a file with so many rows, in a process of its own."""
    path = folder / "rows.csv"
    draw = random.Random(0)
    words = [f"word{i}" for i in range(1000)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(value):
            writer.writerow([" ".join([f"row{i}", *draw.choices(words, k=12)]), "ab"[i % 2]])
    command = [sys.executable, "-m", "benchmarks.reading", str(path), str(locate(BASE).folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(None), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return {"what": "rows", "value": value, **found, "file_bytes": path.stat().st_size}


def at_once(value: int, rows_file: Path) -> dict[str, Any]:
    """Eight adaptations, `value` tokens each in a step; two steps a run where these are large."""
    steps = several.STEPS if value <= several.TOKENS else 2
    rows = synthetic((several.TURNS + 2) * steps * value // 32, 32, VOCABULARY)
    write_rows(rows, rows_file)
    outcomes = several.measure(locate(BASE).folder, rows, rows_file, tokens=value, steps=steps)
    sides = {side: asdict(outcome) for side, outcome in outcomes.items()}
    peak = outcomes[several.TOGETHER].peak_bytes
    return {"what": "several", "value": value, **several.ratios(outcomes), "peak_bytes": peak, "sides": sides}


def points(wanted: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Everything that was asked for, measured one after the other."""
    for what in wanted:
        for value in VALUES[what]:
            if what == "rows":
                yield many_rows(value, folder)
            elif what == "several":
                yield at_once(value, folder / "rows.json")
            else:
                yield measure(what, value, folder / "rows.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--out", type=Path, help="file of results (benchmarks/results/scaling.jsonl)")
    options = parser.parse_args()
    records = Records("scaling", options.out)
    with tempfile.TemporaryDirectory() as scratch:
        for found in points(options.what, Path(scratch)):
            records.add(found)
            say(f"{found['what']} {found['value']}: {found['peak_bytes'] / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
