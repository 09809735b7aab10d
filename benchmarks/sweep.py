"""Looks for the best settings of every peer, one question after the other, and keeps them (`sides.BEST`).

    python -m benchmarks.sweep [--methods lora full ptuning bottleneck] [--data long]

Format with attention, batch size, the library's own loop: each question keeps the winner of the one before. Every candidate
sees the same rows in batches of similar length. All of them are on record, the losing ones too.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.protocol import Setup, Spec, write_rows
from benchmarks.records import Records, say
from benchmarks.rows import reviews
from benchmarks.runner import RunFailed, in_turn
from benchmarks.sides import SIZES, SUBJECTS, alternatives, keep_best, tuned
from benchmarks.turns import batches, deal
from tritune.methods import method
from tritune.models.locate import locate

BASE = "smollm2-135m"
TURNS = 2
PEERS = [name for name, subject in SUBJECTS.items() if not subject.again]  # whose peer is another line's


def speeds(
    name: str, candidates: list[Setup], rows_file: Path, lengths: list[int], per_turn: int, records: Records
) -> dict[Setup, float]:
    """Tokens per second of every candidate that runs, in turns of so many rows."""
    subject = SUBJECTS[name]
    found = {}
    for setup in candidates:
        first, *timed = batches(deal(lengths, TURNS + 1, per_turn, setup.batch), lengths, setup, seed=0)
        turns = [first[:1], *timed]
        spec = Spec(
            setup=setup,
            method=subject.kind,
            config=dict(subject.config),
            folder=str(locate(BASE).folder),
            rows=str(rows_file),
            turns=turns,
            learning_rate=method(subject.kind).learning_rate,
        )
        try:
            outcome = in_turn({name: spec})[name]
        except RunFailed as error:
            say(f"{name} {setup} failed: {error}")
            continue
        rates = [
            sum(lengths[i] for members in turn for i in members) / sum(seconds)
            for turn, seconds in zip(turns[1:], outcome.seconds[1:], strict=True)
        ]
        found[setup] = median(rates)
        records.add(
            {
                "method": name,
                "setup": asdict(setup),
                "tokens_per_second": found[setup],
                "peak_bytes": outcome.peak_bytes,
                "matrix_rates": outcome.matrix_rates,
                "losses": outcome.losses,
                "versions": outcome.versions,
            }
        )
        say(f"{name} {setup.loop} {setup.dtype} {setup.attention} {setup.batch}: {found[setup]:.0f} tokens/s")
    return found


def search(name: str, data: str, rows_file: Path, lengths: list[int], records: Records) -> Setup:
    """The fastest settings, question by question."""
    chosen, known = tuned(name, data), dict[Setup, float]()
    for question in range(len(alternatives(name, chosen, data))):
        candidates = [setup for setup in alternatives(name, chosen, data)[question] if setup not in known]
        known |= speeds(name, candidates, rows_file, lengths, max(SIZES[data]), records)
        chosen = max(known, key=lambda setup: known[setup])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--data", choices=list(SIZES), default="short")
    parser.add_argument("--out", type=Path, help="file of results (benchmarks/results/sweep.jsonl)")
    options = parser.parse_args()
    records = Records("sweep", options.out)
    with tempfile.TemporaryDirectory() as scratch:
        rows = reviews(options.data, (TURNS + 1) * max(SIZES[options.data]), locate(BASE, progress=say).folder)
        rows_file = Path(scratch) / "rows.json"
        write_rows(rows, rows_file)
        lengths = [row.tokens for row in rows]
        for name in options.methods:
            found = search(name, options.data, rows_file, lengths, records)
            keep_best({name: found}, options.data)
            records.add({"method": name, "best": asdict(found)})


if __name__ == "__main__":
    main()
