"""Sources -> checked splits: all files are read first, all problems of all files are raised together.

What every kind of task with one label per row needs. Knows neither prompts nor scores.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tritune.errors import BadData, Problem
from tritune.tasks.base import Example, Split
from tritune.tasks.duplicates import near_duplicates, shared_rows
from tritune.tasks.misspelt import misspelt
from tritune.tasks.rows import Columns, Table, nearest, read_table
from tritune.tasks.sources import Progress, Source, open_source
from tritune.tasks.splits import split_off, subset

_SHOWN_LABELS = 20


class Reading:
    """Collects tables and problems. Use: `read` every source, `check_...`, `raise_problems`, then take the splits."""

    def __init__(self, columns: Columns, progress: Progress | None = None) -> None:
        self.columns = columns
        self.progress = progress
        self.tables: dict[Split, Table] = {}
        self.problems: list[Problem] = []
        self.facts: dict[str, Any] = {"sources": {}, "notes": []}

    def read(self, split: Split, source: Source) -> None:
        """Read all rows of a source. What is wrong with them is kept for `raise_problems`.

        Raises:
            Unavailable: the source could not be fetched.
        """
        opened = open_source(source, split, self.problems, progress=self.progress)
        self.tables[split] = read_table(opened.name, opened.records, self.columns, self.problems)
        self.facts["sources"][split.value] = opened.name
        if opened.note and opened.note not in self.facts["notes"]:
            self.facts["notes"].append(opened.note)

    def found_labels(self) -> tuple[str, ...]:
        """The labels of the training rows (without any: of the test rows), numbers by size, words by alphabet."""
        for split in Split:
            if split in self.tables:
                return tuple(sorted(self.tables[split].labels, key=_label_order))
        return ()

    def check_spelling(self) -> None:
        """No label that was found looks like a more frequent one misspelt: it would be a class nobody wanted."""
        table = next((self.tables[split] for split in Split if split in self.tables), None)
        if table is None:
            return
        counts = Counter(example.label for example in table.examples if example.label is not None)
        for label, meant in misspelt(counts).items():
            first = next(example for example in table.examples if example.label == label)
            more = f" and {_rows(counts[label] - 1)} more" if counts[label] > 1 else ""
            self.problems.append(
                Problem(
                    f"{first.where}, field '{self.columns.label_column}'",
                    f"the label '{label}' (this row{more}) looks like '{meant}' ({_rows(counts[meant])}) misspelt; "
                    "correct it, or name all labels (--labels) if both are meant",
                )
            )

    def check_labels(self, labels: Sequence[str]) -> None:
        """Every row's label is one of `labels`, and every one of `labels` has a training row."""
        if not labels:
            return  # the rows that would have told could not be read, which is said already
        known = set(labels)
        for table in self.tables.values():
            self.problems += [self.unknown_label(e, labels) for e in table.examples if e.label not in known]
        train = self.tables.get(Split.TRAIN)
        if train is not None and train.labels:
            where = f"{train.name}, field '{self.columns.label_column}'"
            self.problems += [
                Problem(where, f"no row has the label '{label}'; every label needs training rows")
                for label in labels
                if label not in train.labels
            ]

    def unknown_label(self, example: Example, labels: Sequence[str]) -> Problem:
        listed = ", ".join(f"'{label}'" for label in labels[:_SHOWN_LABELS])
        more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
        return Problem(
            f"{example.where}, field '{self.columns.label_column}'",
            f"the label '{example.label}' is not known; the labels are {listed}{more}"
            + nearest(example.label or "", labels),
        )

    def check_duplicates(self, *, allowed: bool) -> None:
        """No row of one split is in another one too. Where that is allowed, such rows are counted."""
        found: list[Problem] = []
        for first, second in ((Split.TRAIN, Split.DEV), (Split.TRAIN, Split.TEST), (Split.DEV, Split.TEST)):
            if first in self.tables and second in self.tables:
                found += shared_rows(self.tables[first], self.tables[second])
        self.facts["duplicates_across_splits"] = len(found)
        if not allowed:
            advice = "; delete it from one of them, or allow duplicates (--allow-duplicates) to go on with a caveat"
            self.problems += [replace(problem, what=problem.what + advice) for problem in found]

    def split_dev(self, fraction: float) -> None:
        """Take dev out of train by a hash of the text."""
        train = self.tables[Split.TRAIN]
        kept, dev = split_off(train.examples, fraction, self.columns.text)
        if not dev:
            self.problems.append(
                Problem(train.name, f"{len(train.examples)} rows are too few to take dev rows from; give dev rows")
            )
        self.tables[Split.TRAIN] = Table(train.name, list(kept))
        self.tables[Split.DEV] = Table(train.name, list(dev))
        self.facts["dev"] = f"split off train by a hash of the text, about {fraction:.0%} of the texts"

    def raise_problems(self) -> None:
        """
        Raises:
            BadData: if anything was found, with all of it.
        """
        BadData.check(
            "The data cannot be used.",
            self.problems,
            f"Problems found: {len(self.problems)}. No row was dropped or changed.",
        )

    def splits(self, limits: Mapping[Split, int | None], seed: int) -> dict[Split, tuple[Example, ...]]:
        """The rows of every split, at most `limits` of them."""
        whole = {split: tuple(table.examples) for split, table in self.tables.items()}
        used = {split: _limited(rows, limits.get(split), seed) for split, rows in whole.items()}
        self.facts["rows_available"] = {split.value: len(rows) for split, rows in whole.items()}
        self.facts["near_duplicates"] = near_duplicates(used.get(Split.TRAIN, ()), used.get(Split.TEST, ()))
        return used


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _limited(rows: tuple[Example, ...], limit: int | None, seed: int) -> tuple[Example, ...]:
    return rows if limit is None or limit >= len(rows) else subset(rows, limit, seed)


def _label_order(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if re.fullmatch(r"-?[0-9]{1,18}", label) else (1, 0, label)


def repeats(values: Iterable[str]) -> list[str]:
    """Values that are there more than once, each once."""
    seen: set[str] = set()
    return list(dict.fromkeys(v for v in values if v in seen or seen.add(v)))  # type: ignore[func-returns-value]
