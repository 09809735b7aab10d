"""What it takes to get a file of rows ready for training: read and checked, encoded, an epoch planned. One JSON line.

python -m benchmarks.reading FILE.csv BASE-FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path

from transformers import AutoTokenizer

from tritune.evaluate.examples import encode
from tritune.measure import measured
from tritune.tasks.base import Split
from tritune.tasks.classification import classification
from tritune.text.encode import Encoder
from tritune.train.batches import epoch_batches

LIMIT = 512
BUDGET = 1024


def main() -> None:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    encoder = Encoder(AutoTokenizer.from_pretrained(folder, local_files_only=True), LIMIT)
    marks = [time.perf_counter()]
    with measured() as cost:
        task = classification(str(path), dev_fraction=0.0)
        marks.append(time.perf_counter())
        rows = encode(task, task.examples(Split.TRAIN), encoder)
        marks.append(time.perf_counter())
        epoch_batches([row.n_trained for row in rows.encoded], BUDGET, 0, 0)
        marks.append(time.perf_counter())
    n = len(rows.encoded)
    read, encoded, planned = ((b - a) / n for a, b in pairwise(marks))
    print(
        json.dumps(
            {
                "rows": n,
                "read_microseconds_per_row": 1e6 * read,
                "encode_microseconds_per_row": 1e6 * encoded,
                "plan_microseconds_per_row": 1e6 * planned,
                "peak_bytes": cost.peak_bytes,
                "peak_bytes_per_row": cost.peak_bytes / n,
            }
        )
    )


if __name__ == "__main__":
    main()
