"""Every side gets the same rows in the same turn, and turns are alike."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.protocol import Setup
from benchmarks.turns import batches, by_tokens, deal

OURS = Setup("tritune", "own", "default", "default", 100, sort=True, tuned=False)
PEER = Setup("peft", "own", "float32", "sdpa", 4, sort=True, tuned=True)
PLAIN = Setup("peft", "trainer", "default", "default", 3, sort=False, tuned=False, rows=6)

lengths_of_rows = st.lists(st.integers(1, 60), min_size=64, max_size=64)


@given(lengths_of_rows, st.integers(1, 5), st.integers(1, 10), st.integers(1, 4))
def test_a_row_is_dealt_once(lengths: list[int], turns: int, per_turn: int, group: int) -> None:
    dealt = deal(lengths, turns, per_turn, group)
    rows = [i for turn in dealt for g in turn for i in g]
    assert sorted(rows) == list(range(len(rows)))
    assert {sum(map(len, turn)) for turn in dealt} == {-(-per_turn // group) * group}


@given(lengths_of_rows)
def test_groups_are_as_even_as_sorting_all_rows_makes_them(lengths: list[int]) -> None:
    groups = [g for turn in deal(lengths, 4, 16, 4) for g in turn]
    padded = sum(max(lengths[i] for i in g) * len(g) for g in groups)
    ordered = sorted(lengths)
    assert padded == sum(max(ordered[i : i + 4]) * 4 for i in range(0, 64, 4))


@given(lengths_of_rows, st.integers(0, 9))
def test_all_sides_get_the_rows_of_the_turn(lengths: list[int], seed: int) -> None:
    dealt = deal(lengths, 3, 12, 4)
    ours, peer, plain = (batches(dealt, lengths, setup, seed) for setup in (OURS, PEER, PLAIN))
    for mine, theirs, few in zip(ours, peer, plain, strict=True):
        assert sorted(i for step in mine for i in step) == sorted(i for step in theirs for i in step)
        assert {len(step) for step in theirs} == {4}
        assert [len(step) for step in few] == [3, 3]
        assert {i for step in few for i in step} <= {i for step in mine for i in step}


@given(lengths_of_rows, st.integers(30, 500))
def test_our_steps_are_near_the_budget(lengths: list[int], budget: int) -> None:
    steps = by_tokens(range(64), lengths, budget)
    assert sorted(i for step in steps for i in step) == list(range(64))
    even = sum(lengths) / max(1, round(sum(lengths) / budget))
    assert all(abs(sum(lengths[i] for i in step) - even) <= 2 * max(lengths) for step in steps)


def test_a_smaller_batch_than_the_group_is_cut_from_it() -> None:
    lengths = list(range(1, 17))
    for turn in batches(deal(lengths, 2, 8, 4), lengths, replace(PEER, batch=2), 0):
        assert all(len(step) == 2 and abs(step[0] - step[1]) == 1 for step in turn)
