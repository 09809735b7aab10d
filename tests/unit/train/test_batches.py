"""Batches and steps: every row once per epoch, within the budget, in an order that only the seed decides."""

from __future__ import annotations

from itertools import islice, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tritune.train.batches import epoch_batches, steps, steps_in

lengths_of = st.lists(st.integers(1, 90), min_size=1, max_size=120)
budgets = st.integers(1, 400)


@settings(max_examples=150, deadline=None)
@given(lengths_of, budgets, st.integers(0, 5), st.integers(0, 3))
def test_every_row_once_per_epoch_and_no_batch_above_the_budget(
    lengths: list[int], budget: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, budget, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1


def test_the_order_is_a_function_of_the_seed_and_the_epoch() -> None:
    lengths = [5 + (7 * i) % 23 for i in range(200)]
    once = epoch_batches(lengths, 100, 3, 0)
    assert once == epoch_batches(lengths, 100, 3, 0)
    assert once != epoch_batches(lengths, 100, 4, 0)
    assert once != epoch_batches(lengths, 100, 3, 1)


def test_similar_lengths_meet_and_no_epoch_is_ordered_by_length() -> None:
    lengths = [4 + (37 * i) % 60 for i in range(3000)]
    batches = epoch_batches(lengths, 300, 0, 0)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 10, "at random it would be above 40"
    means = [sum(lengths[i] for i in b) / len(b) for b in batches]
    rising = sum(b > a for a, b in pairwise(means)) / (len(means) - 1)
    assert 0.3 < rising < 0.7
    first = sum(means[: len(means) // 2]) / (len(means) // 2)
    second = sum(means[len(means) // 2 :]) / (len(means) - len(means) // 2)
    assert abs(first - second) < 5


def test_neighbours_change_from_epoch_to_epoch() -> None:
    lengths = [10] * 64
    pairs = [{frozenset(b) for b in epoch_batches(lengths, 20, 0, epoch)} for epoch in range(2)]
    assert len(pairs[0] & pairs[1]) < 8


@settings(max_examples=60, deadline=None)
@given(lengths_of, budgets, st.integers(1, 4), st.integers(0, 3), st.integers(0, 40))
def test_a_resumed_order_is_the_rest_of_the_straight_one(
    lengths: list[int], budget: int, accumulate: int, seed: int, done: int
) -> None:
    more = 12
    straight = list(islice(steps(lengths, budget, accumulate, seed), done + more))
    resumed = list(islice(steps(lengths, budget, accumulate, seed, skip=done), more))
    assert resumed == straight[done:]


@settings(max_examples=60, deadline=None)
@given(lengths_of, budgets, st.integers(1, 4), st.integers(0, 3), st.integers(1, 5))
def test_steps_run_through_epoch_after_epoch(
    lengths: list[int], budget: int, accumulate: int, seed: int, epochs: int
) -> None:
    """Exactly the batches of these epochs, however many each of them is cut into."""
    taken = list(islice(steps(lengths, budget, accumulate, seed), steps_in(epochs, lengths, budget, accumulate, seed)))
    assert all(1 <= len(step) <= accumulate for step in taken)
    wanted = [batch for epoch in range(epochs) for batch in epoch_batches(lengths, budget, seed, epoch)]
    assert [micro for step in taken for micro in step] == wanted


@settings(max_examples=60, deadline=None)
@given(lengths_of, budgets, st.integers(0, 3), st.integers(0, 3), st.integers(1, 10))
def test_a_part_of_an_epoch_is_that_part_of_its_own_steps(
    lengths: list[int], budget: int, seed: int, whole: int, tenths: int
) -> None:
    before = sum(len(epoch_batches(lengths, budget, seed, epoch)) for epoch in range(whole))
    last = len(epoch_batches(lengths, budget, seed, whole))
    wanted = before - (-last * tenths // 10)
    assert steps_in(whole + tenths / 10, lengths, budget, 1, seed) == max(1, wanted)


def test_epochs_of_unequal_numbers_of_batches_do_occur() -> None:
    """Or the laws above would hold for a count that takes the first epoch for all."""
    lengths = [5 + (7 * i) % 23 for i in range(200)]
    assert len({len(epoch_batches(lengths, 60, 0, epoch)) for epoch in range(4)}) > 1
