"""What is told to be ahead: sums, and that it follows what a person changes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tritune.forecast import Work
from tritune.spec import Scope

WORK = Work(train=100, dev=10, test=50, epochs=2, evaluations=3, seeds=1, rates=1, share=0.25, few_shot=False)


def test_one_run_is_training_looking_and_testing() -> None:
    assert WORK.seconds(0.5, [Scope.ROW]) == 0.5 * (2 * 100 * 2 + 3 * 10 + 50)
    assert WORK.seconds(0.5, [Scope.BASE]) == 0.5 * (2 * 100 * 3 + 3 * 10 + 50)


def test_a_search_adds_the_rates_that_lose_once_for_all_seeds() -> None:
    searched = replace(WORK, rates=3, seeds=2)
    assert searched.seconds(1, [Scope.ROW]) == 2 * WORK.seconds(1, [Scope.ROW]) + 2 * 0.25 * 400 + 3 * 10


@pytest.mark.parametrize(
    "more", [{"train": 200}, {"epochs": 4.0}, {"seeds": 2}, {"rates": 2}, {"few_shot": True}, {"test": 90}]
)
def test_more_work_takes_longer(more: dict[str, float]) -> None:
    assert replace(WORK, **more).seconds(1, [Scope.ROW]) > WORK.seconds(1, [Scope.ROW])  # type: ignore[arg-type]


def test_methods_add_up() -> None:
    each = [WORK.seconds(1, [scope]) for scope in Scope]
    assert WORK.seconds(1, list(Scope)) == sum(each)


@pytest.mark.parametrize("seconds", [60.0, 250.0, 900.0])
def test_the_share_of_rows_that_fits_takes_the_time_given(seconds: float) -> None:
    few_shot = replace(WORK, few_shot=True, rates=2)
    share = few_shot.share_within(seconds, 0.25, list(Scope))
    taken = replace(few_shot, train=share * few_shot.train, test=share * few_shot.test)  # type: ignore[arg-type]
    whole = taken.seconds(0.25, list(Scope)) + taken.test * 0.25
    assert whole == pytest.approx(seconds) if share < 1 else whole < seconds


def test_nothing_fits_where_looking_at_dev_alone_takes_longer() -> None:
    assert WORK.share_within(1, 0.5, [Scope.ROW]) == 0
    assert WORK.share_within(10_000, 0.5, [Scope.ROW]) == 1
