"""Speed of classification: rows per second with 2 and with 20 labels, against lm-evaluation-harness on the same ids.

    python -m benchmarks.prediction

Both score every label of every row by its log-likelihood; the mean of these is in each line, and has to agree.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.protocol import Setup, Spec, write_rows
from benchmarks.records import Records, say
from benchmarks.rows import answers, reviews
from benchmarks.runner import in_turn
from tritune.models.dtype import preferred
from tritune.models.locate import locate

BASE = "smollm2-135m"
LABELS = {
    2: ("negative", "positive"),
    20: (
        *("politics", "sports", "business", "science", "health", "travel", "food", "music", "film review", "art"),
        *("technology", "weather", "education", "law and order", "religion", "history", "fashion", "video games"),
        *("personal finance", "local news"),
    ),
}
SIDES = {
    "ours": Setup("tritune", "own", "default", "default", 0, sort=True, tuned=False),
    "best": Setup("lm-eval", "own", preferred("cpu"), "default", 32, sort=True, tuned=True),
    "default": Setup("lm-eval", "own", "default", "default", 1, sort=False, tuned=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", nargs="+", type=int, choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--data", choices=["short", "long"], default="short")
    parser.add_argument("--rows", type=int, default=64, help="rows of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="file of results (benchmarks/results/prediction.jsonl)")
    options = parser.parse_args()
    records = Records("prediction", options.out)
    folder = locate(BASE, progress=say).folder
    with tempfile.TemporaryDirectory() as scratch:
        rows_file = Path(scratch) / "rows.json"
        write_rows(reviews(options.data, options.rows * (options.turns + 1), folder), rows_file)
        turns = [[list(range(t * options.rows, (t + 1) * options.rows))] for t in range(options.turns + 1)]
        for n in options.labels:
            choices = answers(LABELS[n], folder)
            specs = {
                role: Spec(setup, "", {}, str(folder), str(rows_file), turns, 0.0, choices=choices)
                for role, setup in SIDES.items()
            }
            for role, outcome in in_turn(specs, threads=options.threads).items():
                rates = [options.rows / sum(seconds) for seconds in outcome.seconds[1:]]
                records.add(
                    {
                        "labels": n,
                        "role": role,
                        "rows_per_second": median(rates),
                        "turns": rates,
                        "mean_log_likelihood": [-loss for loss in outcome.losses],
                        "peak_bytes": outcome.peak_bytes,
                        "matrix_rates": outcome.matrix_rates,
                        "dtype": outcome.dtype,
                        "threads": outcome.threads,
                        "setup": asdict(specs[role].setup),
                        "versions": outcome.versions,
                    }
                )
                say(f"{n:>2} labels {role:<8} {median(rates):6.2f} rows/s  {outcome.peak_bytes / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
