"""Test rows worth reading: where the methods disagree, and where all of them are wrong. Always the same ones.

Pure function of the answers; knows no way of showing anything.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tritune.evaluate.record import ExampleResult

Examples = Mapping[str, Mapping[int, Sequence[ExampleResult]]]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One test row and what each method answered (with its first seed)."""

    text: str
    gold: str
    answers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of `total` rows, in test order."""

    rows: tuple[SampleRow, ...]
    total: int


def disagreements(examples: Examples, methods: Sequence[str], among: Sequence[str], size: int = 12) -> Sample:
    """Rows on which the methods `among` differ, with the answers of all `methods`; `size` at most, fixed draw."""
    judged = [method for method in among if examples.get(method)]
    found = [row for row in _rows(examples, methods) if len({row.answers[method] for method in judged}) > 1]
    return _draw(found, size)


def all_wrong(examples: Examples, methods: Sequence[str], size: int = 6) -> Sample:
    """Rows on which every one of `methods` is wrong; `size` at most, fixed draw."""
    return _draw([row for row in _rows(examples, methods) if row.gold not in row.answers.values()], size)


def _rows(examples: Examples, methods: Sequence[str]) -> list[SampleRow]:
    first = {method: next(iter(examples[method].values())) for method in methods if examples.get(method)}
    return [
        SampleRow(answered[0].text, answered[0].gold, {m: a.predicted for m, a in zip(first, answered, strict=True)})
        for answered in zip(*first.values(), strict=True)
    ]


def _draw(found: Sequence[SampleRow], size: int) -> Sample:
    places = range(len(found))
    drawn = places if len(found) <= size else sorted(random.Random(0).sample(places, size))
    return Sample(tuple(found[place] for place in drawn), len(found))
