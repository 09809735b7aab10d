"""Training speed of every method against its peers, on the same rows: `make bench`, and the longer forms of it.

    python -m benchmarks.training                       the short form: short rows, best-tuned and default peer
    python -m benchmarks.training --data long --roles ours best default trl trl-tuned
    python -m benchmarks.training --roles equal best    tritune in steps as large as the best peer's
    python -m benchmarks.training --same-batches --roles ours best --turns 10      equal learning, step by step

One JSON line per side and turn; the last line is the summary. Sides take turns (A B C, C B A, ...), each in its own process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch's libraries are mapped
    from benchmarks.libraries import environments, forget

    forget(environments())

from benchmarks import several
from benchmarks.machine import matrix_rates
from benchmarks.protocol import Outcome, Row, Setup, Spec, write_rows
from benchmarks.records import Records, say
from benchmarks.rows import reviews
from benchmarks.runner import RunFailed, in_turn
from benchmarks.sides import SUBJECTS, best, ours, roles
from benchmarks.summary import SEVERAL, Measurement, assemble
from benchmarks.turns import batches, deal
from tritune.methods import method
from tritune.models.locate import locate

BASE = "smollm2-135m"
#: steps of the first turn, which warms up
WARMUP_STEPS = 2
#: rows of a turn: one for so many operations per second that the machine makes
RATE_OF_A_ROW, FEWEST_ROWS, MOST_ROWS = 7e9, 40, 128
#: a turn at whose end the machine was faster or slower by this share is marked
UNSTEADY = 0.05


def specs(
    name: str, setups: Mapping[str, Setup], rows: Sequence[Row], rows_file: Path, options: argparse.Namespace
) -> dict[str, Spec]:
    """What each side of a method does: the same rows in the same turns, in its own batches."""
    lengths = [row.tokens for row in rows]
    subject = SUBJECTS[name]
    dealt = deal(lengths, options.turns + 1, options.rows, best(name, options.data).batch)
    folder = str(locate(BASE).folder)
    found = {}
    for role, setup in setups.items():
        own = ours(options.batch_tokens or subject.step)
        cut = own if options.same_batches and setup.loop == "own" else setup
        first, *timed = batches(dealt, lengths, cut, seed=0)
        again = subject.again and setup.library == "tritune"
        found[role] = Spec(
            setup=setup,
            method=subject.kind,
            config=dict(subject.config),
            folder=folder,
            rows=str(rows_file),
            turns=[[step for turn in timed for step in turn] if again else first[:WARMUP_STEPS], *timed],
            again=again,
            learning_rate=method(subject.kind).learning_rate,
        )
    return found


def measurements(name: str, role: str, spec: Spec, outcome: Outcome, rows: Sequence[Row]) -> list[Measurement]:
    """One for every turn but the first; peak memory is that of the whole process."""
    found = []
    step = len(spec.turns[0])
    for i, turn in enumerate(spec.turns[1:], 1):
        found.append(
            Measurement(
                method=name,
                role=role,
                seconds=sum(outcome.seconds[i]),
                tokens=sum(rows[r].tokens for members in turn for r in members),
                peak_bytes=outcome.peak_bytes,
                flops=sum(outcome.flops[step : step + len(turn)]),
                matrix_rate=max(sum(pair) / 2 for pair in outcome.matrix_rates[i].values()),
            )
        )
        step += len(turn)
    return found


def lines(found: Sequence[Measurement], spec: Spec, outcome: Outcome) -> list[dict[str, Any]]:
    """One line of results for every timed turn."""
    written = []
    step = len(spec.turns[0])
    seen = sum(map(len, spec.turns[0]))
    for i, one in enumerate(found, 1):
        turn = spec.turns[i]
        n = sum(map(len, turn))
        seen += n
        losses = outcome.losses[step : step + len(turn)]
        moved = max(abs(after / before - 1) for before, after in outcome.matrix_rates[i].values())
        step += len(turn)
        written.append(
            {
                "method": one.method,
                "role": one.role,
                "turn": i,
                "tokens_per_second": one.rate,
                "examples_per_second": n / one.seconds,
                "mfu": one.mfu if one.flops else None,
                "peak_bytes": one.peak_bytes,
                "loss": sum(x * len(members) for x, members in zip(losses, turn, strict=True)) / n,
                "examples_seen": seen,
                "seconds": one.seconds,
                "tokens": one.tokens,
                "rows": n,
                "steps": len(turn),
                "matrix_rates": outcome.matrix_rates[i],
                "steady": moved <= UNSTEADY,
                "dtype": outcome.dtype,
                "threads": outcome.threads,
                "setup": asdict(spec.setup),
                "versions": outcome.versions,
            }
        )
    return written


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--roles", nargs="+", default=["ours", "equal", "best", "default"])
    parser.add_argument("--data", choices=["short", "long"], default="short")
    parser.add_argument("--turns", type=int, default=5, help="timed turns of every side")
    parser.add_argument(
        "--rows", type=int, help="rows of a turn (more on a faster machine); rounded up to the best peer's batches"
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        help="tokens of one of tritune's steps, about (its own 512; for lora, full and prefix-suffix-cached 1,024)",
    )
    parser.add_argument("--minutes", type=float, help="leave out methods that would not end before this")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--same-batches", action="store_true", help="a bare loop takes tritune's batches")
    parser.add_argument("--out", type=Path, help="file of results (benchmarks/results/training.jsonl)")
    options = parser.parse_args()
    options.rows = options.rows or rows_of_a_turn()
    return options


def rows_of_a_turn() -> int:
    """Some seconds of work for this machine: single steps of a fast one differ too much."""
    rate = max(matrix_rates("cpu").values())
    return max(FEWEST_ROWS, min(MOST_ROWS, round(rate / RATE_OF_A_ROW)))


def measure(
    name: str, options: argparse.Namespace, rows: Sequence[Row], rows_file: Path, records: Records
) -> list[Measurement]:
    """All sides of one method, in turn.

    Raises:
        RunFailed: a side ended badly.
    """
    setups = roles(name, options.roles, options.batch_tokens, [row.tokens for row in rows], options.data)
    planned = specs(name, setups, rows, rows_file, options)
    outcomes = in_turn(planned, threads=options.threads)
    found = []
    for role, spec in planned.items():
        of_role = measurements(name, role, spec, outcomes[role], rows)
        written = lines(of_role, spec, outcomes[role])
        for record in written:
            records.add(record)
        rate = sorted(one.rate for one in of_role)
        say(
            f"{name:<12}{role:<10}{rate[len(rate) // 2]:7.1f} tokens/s ({rate[0]:.1f} to {rate[-1]:.1f})  "
            f"{of_role[0].peak_bytes / 2**20:6.0f} MB  loss {written[0]['loss']:.2f} -> {written[-1]['loss']:.2f}"
        )
        found += of_role
    return found


def measure_several(
    options: argparse.Namespace, rows: Sequence[Row], rows_file: Path, records: Records
) -> dict[str, float] | None:
    """Several adaptations at once; None where it failed, and says so."""
    try:
        outcomes = several.measure(locate(BASE).folder, rows, rows_file, threads=options.threads)
    except RunFailed as error:
        say(f"{SEVERAL} failed: {error}")
        return None
    for side, outcome in outcomes.items():
        records.add({"method": SEVERAL, "role": side, **asdict(outcome)})
    return several.ratios(outcomes)


def main() -> None:
    options = arguments()
    start = time.monotonic()
    records = Records("training", options.out)
    found: list[Measurement] = []
    longest = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        rows = reviews(options.data, (options.turns + 2) * (options.rows + 64), locate(BASE, progress=say).folder)
        rows_file = Path(scratch) / "rows.json"
        write_rows(rows, rows_file)
        for name in options.methods:
            begin = time.monotonic()
            if options.minutes and begin - start + longest > 60 * options.minutes:
                say(f"{name} is left out: time is up")
                continue
            try:
                found += measure(name, options, rows, rows_file, records)
            except RunFailed as error:
                say(f"{name} failed: {error}")
            longest = max(longest, time.monotonic() - begin)
            say(f"{name} took {time.monotonic() - begin:.0f} s")
        at_once = None if options.data == "long" else measure_several(options, rows, rows_file, records)
    also = {name: subject.against for name, subject in SUBJECTS.items() if subject.against}
    summary = assemble(found, at_once, also)
    records.note({"summary": summary})
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
