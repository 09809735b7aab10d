"""What may honestly be said of scores: intervals, paired tests and the pairs of a comparison.

Numbers in, numbers out: knows no model, no file and no way of showing anything. Everything is a fraction (0.86, not
86 %) and every interval holds 95 % unless said otherwise. Random resampling has a fixed seed: the same results give
the same report. scipy is imported only when needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from tritune.errors import Mismatch, Problem
from tritune.evaluate.record import ALPHA, ExampleResult, Pair

Floats = NDArray[np.float64]
#: method -> seed -> one result per test example, in test order
Results = Mapping[str, Mapping[int, Sequence[ExampleResult]]]

NO_DIFFERENCE = "no difference shown"

RESAMPLES = 9_999
FEW_VALUES = 50
#: up to this many non-zero differences every sign pattern is tried: 2 ** 12 of them
ENUMERATED = 12


# ---- intervals


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927): sound for few examples and near 0 and 1, unlike mean +- 2 errors.

    Raises:
        ValueError: n is not positive, or successes do not lie between 0 and n.
    """
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(scores: Sequence[float], seed: int = 0, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the mean score: Wilson's when every score is 0 or 1, else a percentile bootstrap (Efron 1979).

    Raises:
        ValueError: there are no scores.
    """
    if not len(scores):
        raise ValueError("an interval needs at least one score")
    if _binary(scores):
        return wilson(int(sum(scores)), len(scores), confidence)
    return _bootstrap(np.asarray(scores, dtype=float), seed, confidence)


def difference_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of mean(a) - mean(b), both scored on the same examples in the same order.

    0/1 scores: the adjusted Wald interval for paired proportions (Bonett and Price 2012), which keeps a width even
    where the two never differ. Anything else: a percentile bootstrap over examples.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    differences = _differences(a, b)
    if not (_binary(a) and _binary(b)):
        # Drawn for one of the two directions always, so that swapping a and b turns the interval round exactly.
        turned = np.sort(-differences).tolist() > np.sort(differences).tolist()
        low, high = _bootstrap(-differences if turned else differences, seed, 0.95)
        return (-high, -low) if turned else (low, high)
    from scipy.stats import norm

    n = len(differences) + 2
    only_a = (int(np.sum(differences > 0)) + 1) / n
    only_b = (int(np.sum(differences < 0)) + 1) / n
    centre = only_a - only_b
    half = float(norm.ppf(0.975)) * sqrt((only_a + only_b - centre**2) / n)
    return max(-1.0, centre - half), min(1.0, centre + half)


def _bootstrap(values: Floats, seed: int, confidence: float) -> tuple[float, float]:
    """Percentile bootstrap of the mean."""
    low, high = np.quantile(_resampled_means(values, seed), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _resampled_means(values: Floats, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= FEW_VALUES:  # drawing how often each value comes is the same, and much quicker
        drawn: Floats = rng.multinomial(len(values), counts / len(values), size=RESAMPLES) @ distinct / len(values)
        return drawn
    rows = max(1, 2_000_000 // len(values))  # bounds memory to some 16 MB whatever n is
    sizes = [min(rows, RESAMPLES - done) for done in range(0, RESAMPLES, rows)]
    return np.concatenate([values[rng.integers(len(values), size=(size, len(values)))].mean(1) for size in sizes])


# ---- tests


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of "a and b are right equally often", 0/1 scores of the same examples: exact test (McNemar 1947).

    Only examples where exactly one is right tell anything; among them either is as likely under the null.

    Raises:
        ValueError: the two differ in length, are empty, or hold a score other than 0 and 1.
    """
    if not (_binary(a) and _binary(b)):
        raise ValueError("McNemar's test needs scores of 0 and 1")
    from scipy.stats import binomtest

    differences = _differences(a, b)
    only_a, only_b = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def sign_flip(a: Sequence[float], b: Sequence[float], seed: int = 0) -> float:
    """Two-sided p of "a and b score alike", any scores: paired permutation test (Fisher 1935, Pitman 1937).

    Under the null the sign of every difference is a coin toss. All patterns are tried when there are few, else
    `RESAMPLES` random ones, and p then counts the observed one in, so that it is never 0 (Phipson and Smyth 2010).

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    differences = _differences(a, b)
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    sizes = np.abs(differences)
    observed = abs(float(differences.sum())) * (1 - 1e-12)  # ties must count, rounding must not break them
    if len(sizes) <= ENUMERATED:
        sums = np.array(list(product((-1.0, 1.0), repeat=len(sizes)))) @ sizes
        return float(np.mean(np.abs(sums) >= observed))
    distinct, counts = np.unique(sizes, return_counts=True)
    rng = np.random.default_rng(seed)
    sums = np.zeros(RESAMPLES)
    for value, count in zip(distinct, counts, strict=True):
        sums += value * (2 * rng.binomial(count, 0.5, size=RESAMPLES) - count)
    return float((1 + np.sum(np.abs(sums) >= observed)) / (1 + RESAMPLES))


def by_example(a: Sequence[float], b: Sequence[float]) -> float:
    """The paired test that fits the scores: McNemar's for 0/1, else the paired permutation test."""
    return mcnemar(a, b) if _binary(a) and _binary(b) else sign_flip(a, b)


def by_seed(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test (Student 1908) over seeds: one mean score per seed, both in the same seed order.

    None where it cannot be computed: fewer than two seeds, or differences without any spread that are not all zero.

    Raises:
        ValueError: the two differ in length.
    """
    if len(a) < 2 and len(a) == len(b):
        return None
    differences = _differences(a, b)
    if np.ptp(differences) <= 1e-12:
        return 1.0 if abs(differences[0]) <= 1e-12 else None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values corrected for having tested them all (step-down, Holm 1979), in the order given; never below the raw."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _differences(a: Sequence[float], b: Sequence[float]) -> Floats:
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired scores must be as many on both sides, and some: {len(a)} and {len(b)}")
    differences: Floats = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    return differences


# ---- the pairs of a comparison


def compare_pairs(results: Results) -> tuple[Pair, ...]:
    """Every two methods, compared on the same examples. `a` comes before `b` in the order of `results`.

    Pooling: a method's score of an example is its mean over that method's seeds (prompting has one), and the test by
    example pairs these means; with one seed each this is McNemar's test, else the permutation test. The test by seed
    pairs the mean scores of the seeds that both have. p is corrected by Holm over all pairs of this call.

    A difference is shown when the corrected p by example is below `ALPHA` and no shared seed points the other way.

    Raises:
        Mismatch: a method without results, or with other examples (ids, right answers, order) than the first method.
    """
    _check_same_examples(results)
    pairs = list(combinations(results, 2))
    pooled = {method: _pooled(seeds) for method, seeds in results.items()}
    means = {method: {seed: _mean(rows) for seed, rows in seeds.items()} for method, seeds in results.items()}
    raw = [by_example(pooled[a], pooled[b]) for a, b in pairs]
    return tuple(
        _pair(a, b, pooled, means, p, adjusted) for (a, b), p, adjusted in zip(pairs, raw, holm(raw), strict=True)
    )


def _pair(
    a: str,
    b: str,
    pooled: Mapping[str, Sequence[float]],
    means: Mapping[str, Mapping[int, float]],
    p: float,
    adjusted: float,
) -> Pair:
    difference = float(np.mean(_differences(pooled[a], pooled[b])))
    low, high = difference_interval(pooled[a], pooled[b])
    shared = sorted(means[a].keys() & means[b].keys())
    towards_a = [means[a][seed] - means[b][seed] for seed in shared]
    contradicted = any(step * difference < 0 for step in towards_a)
    better = (a if difference > 0 else b) if adjusted < ALPHA and difference and not contradicted else None
    return Pair(
        a=a,
        b=b,
        difference=difference,
        low=low,
        high=high,
        p_by_example=p,
        p_by_seed=by_seed([means[a][seed] for seed in shared], [means[b][seed] for seed in shared]),
        n=len(pooled[a]),
        seeds=min(len(means[a]), len(means[b])),
        verdict=f"{better} is better" if better else NO_DIFFERENCE,
        p_adjusted=adjusted,
        better=better,
    )


def _pooled(seeds: Mapping[int, Sequence[ExampleResult]]) -> tuple[float, ...]:
    """Mean score of each example over the seeds."""
    return tuple(sum(row.score for row in rows) / len(rows) for rows in zip(*seeds.values(), strict=True))


def _mean(rows: Sequence[ExampleResult]) -> float:
    return sum(row.score for row in rows) / len(rows)


def _check_same_examples(results: Results) -> None:
    every = {f"{method}, seed {seed}": rows for method, seeds in results.items() for seed, rows in seeds.items()}
    problems = [Problem(method, "no results") for method, seeds in results.items() if not seeds]
    problems += [Problem(where, "no examples") for where, rows in every.items() if not rows]
    first = next(iter(every), "")
    for where, rows in every.items():
        if len(rows) != len(every[first]):
            problems.append(Problem(where, f"{len(rows)} examples, but {len(every[first])} in {first}"))
        elif odd := [i for i, pair in enumerate(zip(rows, every[first], strict=True)) if not _same_example(*pair)]:
            at = odd[0]
            problems.append(
                Problem(where, f"{len(odd)} other examples than {first}, first at position {at}: id {rows[at].id!r}")
            )
    Mismatch.check(
        "These results cannot be paired.", problems, "Every method must answer the same test examples in one order."
    )


def _same_example(a: ExampleResult, b: ExampleResult) -> bool:
    return (a.id, a.gold) == (b.id, b.gold)
