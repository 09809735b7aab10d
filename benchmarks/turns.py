"""Which rows each side takes in which turn. Every turn has short and long rows in the same proportion, so that turns can be
compared, and all sides get the same rows; a side with unsorted small batches may do with the first of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.protocol import Setup


def deal(lengths: Sequence[int], turns: int, per_turn: int, group: int) -> list[list[list[int]]]:
    """Rows for each turn as groups of similar length, the size of a peer's batch.

    All rows are sorted by length and cut into groups; neighbouring groups go to different turns, so every turn has
    some of every length, and a peer's padding is as small as sorting all rows makes it.

    Args:
        per_turn: rows of a turn at least; whole groups are dealt.
    """
    n_groups = -(-per_turn // group)
    needed = turns * n_groups * group
    assert len(lengths) >= needed, f"{needed} rows are needed"
    order = sorted(range(needed), key=lambda i: lengths[i])
    groups = [order[start : start + group] for start in range(0, needed, group)]
    dealt: list[list[list[int]]] = [[] for _ in range(turns)]
    for level in range(n_groups):
        here = groups[level * turns : (level + 1) * turns]
        for turn in range(turns):  # every other level backwards, which evens out the sums
            dealt[turn].append(here[turn if level % 2 == 0 else turns - 1 - turn])
    return dealt


def batches(
    dealt: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], setup: Setup, seed: int
) -> list[list[list[int]]]:
    """The steps of every turn as this side takes them: tritune by tokens, a tuned peer group by group, another at random."""
    draw = random.Random(seed)
    found = []
    for groups in dealt:
        rows = [i for group in groups for i in group]
        if setup.library == "tritune":
            steps = by_tokens(rows, lengths, setup.batch)
        elif setup.sort:
            steps = [list(group[at : at + setup.batch]) for group in groups for at in range(0, len(group), setup.batch)]
        else:
            draw.shuffle(rows)
            steps = [rows[at : at + setup.batch] for at in range(0, min(len(rows), setup.rows), setup.batch)]
        draw.shuffle(steps)
        found.append(steps)
    return found


def by_tokens(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in steps of about equal numbers of tokens, near `budget`; similar lengths together."""
    ordered = sorted(rows, key=lambda i: lengths[i])
    total = sum(lengths[i] for i in rows)
    n = max(1, round(total / budget))
    steps: list[list[int]] = [[] for _ in range(n)]
    done = 0
    for i in ordered:
        steps[min(n - 1, done * n // total)].append(i)
        done += lengths[i]
    return [step for step in steps if step]
