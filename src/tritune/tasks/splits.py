"""Which row belongs where, decided by hashes: stable over machines, files' order and what other rows there are.

Knows examples only, no files. A hash of the text decides, so equal texts never end up on two sides.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from tritune.tasks.base import Example

T = TypeVar("T")


def unit_hash(text: str, salt: str = "") -> float:
    """A number in [0, 1) made of a text by sha256. Equal on every machine, unlike Python's own hash."""
    data = f"{salt}\0{text}" if salt else text
    return int.from_bytes(hashlib.sha256(data.encode("utf-8", "surrogatepass")).digest()[:6]) / 2**48


def split_off(
    examples: Sequence[Example], fraction: float, text_field: str
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(train, dev): about `fraction` of the texts go to dev.

    A text whose hash lies below `fraction` is a dev text, whatever the other rows are. Two repairs for small data: a
    label that would be left without training rows keeps all of its texts in train, and where no text lies low enough,
    the lowest one that train can spare is taken. Dev stays empty where train can spare none.
    """
    hashes = {e.fields[text_field]: unit_hash(e.fields[text_field]) for e in examples}
    dev = {text for text, place in hashes.items() if place < fraction}
    kept = {e.label for e in examples if e.fields[text_field] not in dev}
    dev -= {e.fields[text_field] for e in examples if e.label not in kept}
    if not dev and fraction > 0:
        dev = _lowest_spare(examples, hashes, text_field)
    return (
        tuple(e for e in examples if e.fields[text_field] not in dev),
        tuple(e for e in examples if e.fields[text_field] in dev),
    )


def subset(examples: Sequence[Example], rows: int, seed: int) -> tuple[Example, ...]:
    """`rows` of the examples, in file order, with the labels in about their proportions and each at least once.

    Nested: for one seed, a smaller subset lies inside every larger one.
    """
    chosen = {id(example) for example in _drawing_order(examples, seed)[:rows]}
    return tuple(example for example in examples if id(example) in chosen)


def balanced(examples: Sequence[Example], labels: Sequence[str], rows: int, seed: int) -> tuple[Example, ...]:
    """`rows` examples with every label as often as every other (give or take one), in an order drawn by the seed.

    A label with too few examples leaves its places to the others. Fewer than `rows` only where there are fewer.
    """
    queues = _by_label(examples, seed)
    # Which labels get the places left over is drawn too: else the first label would always have one more.
    order = sorted(labels, key=lambda label: unit_hash(label, f"labels {seed}"))
    picked: list[Example] = []
    turn = 0
    while len(picked) < rows:
        left = [label for label in order if len(queues.get(label, ())) > turn]
        if not left:
            break
        picked += [queues[label][turn] for label in left[: rows - len(picked)]]
        turn += 1
    return tuple(sorted(picked, key=lambda e: unit_hash(e.id, f"order {seed}")))


def _drawing_order(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every prefix of this order has the labels in about their proportions."""
    ranked = [
        # One row of each label first; after that, rank over count keeps the proportions.
        ((rank + 0.5) / len(rows) if rank else -1.0, unit_hash(e.id, f"subset {seed}"), e)
        for rows in _by_label(examples, seed).values()
        for rank, e in enumerate(rows)
    ]
    return [example for *_, example in sorted(ranked, key=lambda item: item[:2])]


def _by_label(examples: Sequence[Example], seed: int) -> dict[str | None, list[Example]]:
    """The examples of each label, in an order drawn by the seed."""
    grouped: dict[str | None, list[Example]] = defaultdict(list)
    for example in examples:
        grouped[example.label].append(example)
    return {label: sorted(rows, key=lambda e: unit_hash(e.id, f"{seed}")) for label, rows in grouped.items()}


def _lowest_spare(examples: Sequence[Example], hashes: Mapping[str, float], text_field: str) -> set[str]:
    rows = Counter(e.label for e in examples)
    held: dict[str, Counter[str | None]] = defaultdict(Counter)
    for e in examples:
        held[e.fields[text_field]][e.label] += 1
    for text in sorted(hashes, key=hashes.__getitem__):
        if all(rows[label] > count for label, count in held[text].items()):
            return {text}
    return set()
