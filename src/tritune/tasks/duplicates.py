"""Rows that are there twice: across splits they make a test score worthless. Knows tables of examples, no files.

Two rows are *the same row* when all fields that the prompt shows agree, and so does every other column of the file,
apart from the label and from columns that merely number the rows (no value in them appears twice). That makes a copied
row an error, while a file that asks several questions about one sentence (another entity, another span) stays usable;
such rows are counted as near-duplicates, as are rows that differ in case, white space and punctuation only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from tritune.errors import Problem
from tritune.tasks.base import Example
from tritune.tasks.rows import Table

_NOT_WORD = re.compile(r"[\W_]+")

Key = tuple[tuple[str, str], ...]


def shared_rows(first: Table, second: Table) -> list[Problem]:
    """The rows of `second` that are in `first` too."""
    places: dict[Key, list[int]] = defaultdict(list)
    for index, example in enumerate(first.examples):
        places[_key(example)].append(index)
    met = [(index, places[key]) for index, e in enumerate(second.examples) if (key := _key(e)) in places]
    if not met:
        return []
    ignored = _numbering(first) & _numbering(second)
    problems = []
    for index, others in met:
        twin = next((o for o in others if _same(first.rest[o], second.rest[index], ignored)), None)
        if twin is not None:
            where = first.examples[twin].where
            problems.append(Problem(second.examples[index].where, f"the same row is in {first.name} too ({where})"))
    return problems


def near_duplicates(first: Sequence[Example], second: Sequence[Example]) -> int:
    """How many rows of `second` show what a row of `first` shows; case, white space and punctuation aside."""
    known = {_folded(example) for example in first}
    return sum(_folded(example) in known for example in second)


def repeated(examples: Sequence[Example]) -> tuple[int, int]:
    """(rows that repeat an earlier one, rows whose label contradicts an earlier one's) within one split."""
    labels: dict[Key, set[str | None]] = {}
    rows = contradictions = 0
    for example in examples:
        known = labels.setdefault(_key(example), set())
        rows += bool(known)
        contradictions += bool(known) and example.label not in known
        known.add(example.label)
    return rows, contradictions


def _key(example: Example) -> Key:
    return tuple(sorted(example.fields.items()))


def _folded(example: Example) -> Key:
    # Texts without a single letter or digit (emoji, punctuation) are compared as they are.
    return tuple((k, _NOT_WORD.sub(" ", v.casefold()).strip() or v) for k, v in _key(example))


def _numbering(table: Table) -> set[str]:
    columns = {column for row in table.rest for column in row}
    rows = len(table.rest)
    return {c for c in columns if len({row[c] for row in table.rest if c in row}) == rows}


def _same(one: dict[str, str], other: dict[str, str], ignored: set[str]) -> bool:
    return all(one[column] == other[column] for column in one.keys() & other.keys() - ignored)
