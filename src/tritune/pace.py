"""How fast this machine answers: seconds per row of a task on a base. Knows no method; trains nothing."""

from __future__ import annotations

import time

from tritune.adaptation import encoder_for
from tritune.evaluate import examples
from tritune.models.pretrained import Base
from tritune.tasks.base import Split, Task

#: rows that are answered first, untimed: what is made once per base is made by then
WARM_UP = 16


def seconds_per_row(base: Base, task: Task) -> float:
    """Of answering the dev rows; the test rows are not touched.

    Raises:
        BadData: rows that are too long for the base.
    """
    rows = task.examples(Split.DEV)
    examples.answer(base, task, examples.encode(task, rows[:WARM_UP], encoder_for(base)))
    encoded = examples.encode(task, rows, encoder_for(base))
    start = time.perf_counter()
    examples.answer(base, task, encoded)
    return (time.perf_counter() - start) / len(rows)
