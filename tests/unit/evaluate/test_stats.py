"""Intervals and tests against independent oracles: enumeration, textbook figures, scipy's other functions."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from tritune.errors import Mismatch
from tritune.evaluate.record import ExampleResult
from tritune.evaluate.stats import (
    NO_DIFFERENCE,
    by_seed,
    compare_pairs,
    difference_interval,
    holm,
    mcnemar,
    mean_interval,
    sign_flip,
    wilson,
)


def results(scores: list[float], prefix: str = "r") -> list[ExampleResult]:
    return [
        ExampleResult(id=f"{prefix}{i}", text="", gold="x", predicted="x" if s == 1 else "y", score=float(s))
        for i, s in enumerate(scores)
    ]


# ---- intervals


def test_wilson_is_the_textbook_interval() -> None:
    # Newcombe 1998 (Statistics in Medicine 17, 857), table I: 81 of 263, method 3
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_refuses_nonsense() -> None:
    with pytest.raises(ValueError):
        wilson(3, 2)
    with pytest.raises(ValueError):
        wilson(0, 0)


@pytest.mark.parametrize("p", [0.5, 0.74, 0.86, 0.97])
def test_wilson_covers_the_truth_about_as_often_as_it_says(p: float) -> None:
    n = 100
    covered = sum(
        comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]
    )
    assert 0.92 < covered < 0.99


def test_mean_interval_of_right_and_wrong_is_wilsons() -> None:
    assert mean_interval([1.0] * 7 + [0.0] * 3) == wilson(7, 10)
    assert mean_interval([1.0] * 10) == wilson(10, 10)


def test_mean_interval_of_other_scores_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    draws = [np.round(rng.beta(4, 2, size=80), 1) for _ in range(150)]
    truth = float(np.mean(np.round(rng.beta(4, 2, size=200_000), 1)))
    intervals = [mean_interval(list(draw)) for draw in draws]
    assert 0.88 < np.mean([low <= truth <= high for low, high in intervals]) <= 1


def test_bootstrap_agrees_with_the_normal_interval_of_many_scores_and_repeats() -> None:
    scores = list(np.random.default_rng(0).random(2_000))
    low, high = mean_interval(scores, seed=1)
    half = 1.96 * float(np.std(scores)) / 2_000**0.5
    assert (low, high) == pytest.approx((np.mean(scores) - half, np.mean(scores) + half), abs=5e-4)
    assert mean_interval(scores, seed=1) == (low, high)


def test_an_interval_needs_scores() -> None:
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_difference_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    n, only_a, only_b = 30, 0.25, 0.1
    covered = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            low, high = difference_interval([1.0] * b + [0.0] * (n - b), [0.0] * b + [1.0] * c + [0.0] * (n - b - c))
            if low <= only_a - only_b <= high:
                ways = comb(n, b) * comb(n - b, c)
                covered += ways * only_a**b * only_b**c * (1 - only_a - only_b) ** (n - b - c)
    assert 0.93 < covered < 0.985


def test_difference_interval_keeps_a_width_where_nothing_differs() -> None:
    low, high = difference_interval([1.0] * 50, [1.0] * 50)
    assert -0.1 < low < 0 < high < 0.1


# ---- tests


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 0), (8, 2), (10, 10), (3, 17)])
def test_mcnemar_by_enumeration(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    weights = [comb(n, k) for k in range(n + 1)]
    expected = sum(w for w in weights if w <= weights[only_a]) / 2**n
    a = [1.0] * only_a + [0.0] * only_b + [1.0, 0.0]
    b = [0.0] * only_a + [1.0] * only_b + [1.0, 0.0]
    assert mcnemar(a, b) == pytest.approx(expected)


def test_mcnemar_wants_right_and_wrong_only() -> None:
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar([0.5], [1.0])


def test_sign_flip_of_few_examples_is_exact() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(9), rng.random(9)
    oracle = scipy_stats.permutation_test((a - b,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(list(a), list(b)) == pytest.approx(oracle.pvalue)


def test_sign_flip_of_many_examples_is_near_the_normal_test() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.random(400), rng.random(400) + 0.03
    d = a - b
    expected = 2 * scipy_stats.norm.sf(abs(d.sum()) / np.sqrt((d**2).sum()))
    assert sign_flip(list(a), list(b)) == pytest.approx(expected, rel=0.15)


def test_sign_flip_is_never_zero_and_agrees_with_mcnemar() -> None:
    assert 0 < sign_flip([1.0] * 100, [0.5] * 100) < 0.001
    a, b = [1.0] * 30 + [0.0] * 15, [0.0] * 30 + [1.0] * 15
    assert sign_flip(a, b) == pytest.approx(mcnemar(a, b), abs=0.01)


def test_by_seed_is_the_paired_t_test() -> None:
    a, b = [0.86, 0.85, 0.88, 0.87], [0.84, 0.845, 0.85, 0.86]
    assert by_seed(a, b) == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue)


def test_by_seed_says_nothing_where_nothing_can_be_said() -> None:
    assert by_seed([], []) is None
    assert by_seed([0.9], [0.8]) is None
    assert by_seed([0.9, 0.8], [0.8, 0.7]) is None  # the same difference twice: no spread to judge it by
    assert by_seed([0.9, 0.8], [0.9, 0.8]) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(raw <= new <= 1 for raw, new in zip(p_values, adjusted, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i, p in enumerate(p_values) for j, q in enumerate(p_values) if p <= q)


# ---- pairs

binary = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60)
graded = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=15)


@settings(max_examples=25, deadline=None)
@given(st.one_of(binary, graded))
def test_swapping_the_methods_turns_the_pair_round(scores: list[tuple[float, float]]) -> None:
    a, b = results([x for x, _ in scores]), results([y for _, y in scores])
    (pair,), (turned,) = compare_pairs({"a": {0: a}, "b": {0: b}}), compare_pairs({"b": {0: b}, "a": {0: a}})
    assert turned.difference == pytest.approx(-pair.difference)
    assert (turned.p_by_example, turned.better) == (pytest.approx(pair.p_by_example), pair.better)
    assert (turned.low, turned.high) == pytest.approx((-pair.high, -pair.low))


def test_identical_results_show_no_difference() -> None:
    same = results([1.0, 0.0] * 40)
    (pair,) = compare_pairs({"a": {0: same, 1: same}, "b": {0: same, 1: same}})
    assert (pair.difference, pair.p_by_example, pair.p_adjusted, pair.p_by_seed) == (0.0, 1.0, 1.0, 1.0)
    assert (pair.verdict, pair.better) == (NO_DIFFERENCE, None)


def test_a_clear_difference_is_shown_and_named() -> None:
    (pair,) = compare_pairs({"weak": {0: results([0.0] * 60 + [1.0] * 40)}, "strong": {0: results([1.0] * 100)}})
    assert (pair.better, pair.verdict, pair.seeds, pair.n) == ("strong", "strong is better", 1, 100)
    assert pair.difference == pytest.approx(-0.6)
    assert pair.low < -0.6 < pair.high < 0
    assert pair.p_by_seed is None


def test_many_pairs_need_stronger_evidence() -> None:
    few = {"a": {0: results([1.0] * 8 + [0.0] * 42)}, "b": {0: results([0.0] * 50)}}
    assert compare_pairs(few)[0].better == "a"
    more = few | {f"same{i}": {0: results([0.0] * 50)} for i in range(5)}
    pairs = compare_pairs(more)
    assert len(pairs) == 21
    assert pairs[0].p_by_example == compare_pairs(few)[0].p_by_example
    assert pairs[0].better is None


def test_seeds_are_pooled_by_example() -> None:
    first, second = [1.0, 1.0, 0.0, 0.0] * 10, [1.0, 0.0, 1.0, 0.0] * 10
    (pair,) = compare_pairs({"a": {0: results(first), 1: results(second)}, "b": {0: results([0.5] * 40)}})
    assert pair.difference == pytest.approx(0.0)
    assert (pair.seeds, pair.p_by_seed) == (1, None)  # b has one seed


def test_a_seed_that_points_the_other_way_forbids_a_verdict() -> None:
    good, bad = results([1.0] * 90 + [0.0] * 10), results([1.0] * 60 + [0.0] * 40)
    middle = results([1.0] * 70 + [0.0] * 30)
    (pair,) = compare_pairs({"a": {0: good, 1: good, 2: bad}, "b": {0: middle, 1: middle, 2: middle}})
    assert pair.p_adjusted is not None
    assert pair.p_adjusted < 0.05
    assert pair.better is None


def test_every_misfit_is_named_at_once() -> None:
    good = results([1.0, 0.0, 1.0])
    with pytest.raises(Mismatch) as caught:
        compare_pairs({"a": {0: good}, "b": {0: good[::-1], 1: good[:2]}, "c": {}, "d": {0: []}})
    text = str(caught.value)
    assert len(caught.value.problems) == 5  # d is empty and has another length
    assert all(name in text for name in ("b, seed 0", "b, seed 1", "c: no results", "d, seed 0: no examples"))


def test_other_right_answers_are_a_misfit() -> None:
    good = results([1.0])
    with pytest.raises(Mismatch, match="id 'r0'"):
        compare_pairs({"a": {0: good}, "b": {0: [good[0].model_copy(update={"gold": "z"})]}})


def test_one_method_has_no_pairs() -> None:
    assert compare_pairs({"a": {0: results([1.0])}}) == ()
