"""Each caveat appears when its cause does and only then, and every one can be said in both languages."""

from __future__ import annotations

from string import Formatter

import pytest

from tritune.evaluate.caveats import TEXTS, caveat_text, caveats
from tritune.evaluate.record import Caveat, CurvePoint, Entry, ExampleResult, SearchPoint
from tritune.evaluate.stats import compare_pairs


def entry(method: str = "m", strategy: str = "adapters", seed: int = 0, **changes: object) -> Entry:
    plain = {
        "method": method, "strategy": strategy, "seed": seed, "metric": "accuracy", "score": 0.8, "low": 0.79,
        "high": 0.81, "n": 5000, "trainable_parameters": 1, "stored_bytes": 1, "train_seconds": 1.0,
        "train_tokens_per_second": 1.0, "train_peak_bytes": 1, "eval_peak_bytes": 1, "seconds_per_1000_rows": 1.0,
        "adaptation": None, "search": search(), "train_rows": 1000,
    }  # fmt: skip
    return Entry.model_validate(plain | changes)


def search(chosen: int = 1, rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2), steps: int = 10) -> tuple[SearchPoint, ...]:
    return tuple(
        SearchPoint(learning_rate=rate, steps=steps, dev_loss=1.0, dev_score=0.5, chosen=place == chosen)
        for place, rate in enumerate(rates)
    )


def zero_shot(**changes: object) -> Entry:
    return entry("zero-shot", "prompting", **{"score": 0.7, "search": (), "train_rows": 0} | changes)


def keys(*entries: Entry, **known: object) -> list[str]:
    return [found.key for found in caveats(entries, (), **known)]  # type: ignore[arg-type]


def answers(scores: list[float], labels: str = "x") -> list[ExampleResult]:
    return [
        ExampleResult(id=str(i), text="", gold=(gold := labels[i % len(labels)]), predicted=gold if s else "?", score=s)
        for i, s in enumerate(scores)
    ]


FIVE = tuple(entry(seed=seed) for seed in range(5))


def test_nothing_to_limit_leaves_the_equal_search_only() -> None:
    assert keys(zero_shot(), *FIVE) == ["search_equal"]


def test_no_entries_no_caveats_but_the_missing_baseline() -> None:
    assert keys() == ["no_baseline"]


@pytest.mark.parametrize(
    ("entries", "known", "expected"),
    [
        ((zero_shot(), entry()), {}, "one_seed"),
        ((zero_shot(), *FIVE[:3]), {}, "few_seeds"),
        (FIVE, {}, "no_baseline"),
        ((zero_shot(score=0.9), *FIVE), {}, "not_above_baseline"),
        ((zero_shot(), *FIVE[:4], entry(seed=4, score=0.5, low=0.45, high=0.55)), {}, "unstable"),
        ((zero_shot(low=0.6, high=0.8, n=60), *FIVE), {}, "small_test"),
        ((zero_shot(), *FIVE), {"dev_rows": 199}, "small_dev"),
        ((zero_shot(), *FIVE), {"train_rows_available": 1001}, "train_subset"),
        ((zero_shot(), *FIVE), {"near_duplicates": 3}, "near_duplicates"),
        ((zero_shot(), entry(search=search(0))), {}, "grid_low"),
        ((zero_shot(), entry(search=search(2))), {}, "grid_high"),
        ((zero_shot(), entry(search=search(0, (1e-4, 1e-3)))), {}, "small_grid"),
        ((zero_shot(), entry(search=())), {}, "no_search"),
        ((zero_shot(), entry("a"), entry("b", search=search(steps=20))), {}, "search_unequal"),
    ],
)
def test_a_cause_brings_its_caveat(entries: tuple[Entry, ...], known: dict[str, int], expected: str) -> None:
    assert expected in keys(*entries, **known)
    assert expected not in keys(zero_shot(), *FIVE, dev_rows=200, train_rows_available=1000, near_duplicates=0)


def test_a_grid_of_edges_is_told_once_and_calmly() -> None:
    """The demo has two rates: an edge under every method would read as an alarm, and says nothing."""
    both = (1e-4, 1e-3)
    found = caveats([zero_shot(), entry("a", search=search(0, both)), entry("b", search=search(1, both))], ())
    assert [one.values for one in found if one.key == "small_grid"] == [{"rates": 2}]
    assert not {"grid_low", "grid_high"} & {one.key for one in found}
    one = (1e-3,)
    assert keys(zero_shot(), entry(search=search(0, one))) == ["one_seed", "no_search"]


def test_best_at_the_last_evaluation() -> None:
    curve = tuple(CurvePoint(step=step, rows=step, tokens=step, seconds=1.0) for step in (5, 10))
    assert "still_improving" in keys(zero_shot(), entry(curve=curve, best_step=10))
    assert "still_improving" not in keys(zero_shot(), entry(curve=curve, best_step=5))


def test_always_the_most_frequent_label_would_do() -> None:
    lazy = {"m": {0: answers([1.0, 1.0, 1.0, 0.0], "xxxy")}}
    found = [caveat for caveat in caveats([zero_shot(), *FIVE], (), results=lazy) if caveat.key == "majority"]
    assert [caveat.values for caveat in found] == [{"score": 0.75, "methods": "m"}]
    assert "majority" not in keys(zero_shot(), *FIVE, results={"m": {0: answers([1.0] * 4, "xxxy")}})
    assert "majority" not in keys(zero_shot(), *FIVE, results={"m": {0: answers([0.5] * 4, "xxxy")}})  # no 0/1 score


def test_the_test_decides_what_is_above_the_baseline() -> None:
    results = {"zero-shot": {0: answers([0.0] * 50 + [1.0] * 50)}, "m": {0: answers([0.0] * 49 + [1.0] * 51)}}
    found = caveats([zero_shot(score=0.5), entry(score=0.51)], compare_pairs(results))
    assert "not_above_baseline" in [caveat.key for caveat in found]


def test_shown_by_example_but_not_by_seed() -> None:
    good, near = answers([1.0] * 100), answers([1.0] * 81 + [0.0] * 19)
    results = {"a": {0: good, 1: good}, "b": {0: answers([1.0] * 60 + [0.0] * 40), 1: near}}
    pairs = compare_pairs(results)
    assert pairs[0].better == "a"
    entries = [zero_shot(), *(entry(method, seed=seed) for method in "ab" for seed in (0, 1))]
    assert "seeds_undecided" in [caveat.key for caveat in caveats(entries, pairs)]


def test_shown_by_example_but_a_seed_says_the_opposite() -> None:
    results = {
        "a": {0: answers([1.0] * 100), 1: answers([1.0] * 80 + [0.0] * 20)},
        "b": {0: answers([1.0] * 40 + [0.0] * 60), 1: answers([1.0] * 81 + [0.0] * 19)},
    }
    pairs = compare_pairs(results)
    assert pairs[0].better is None
    entries = [zero_shot(), *(entry(method, seed=seed) for method in "ab" for seed in (0, 1))]
    found = {caveat.key: caveat for caveat in caveats(entries, pairs)}
    assert found["seeds_contradict"].values == {"pairs": "a / b"}
    assert "seeds_undecided" not in found


def test_the_seeds_that_are_apart_are_told_with_their_scores() -> None:
    entries = [zero_shot(), entry(score=0.8, low=0.7, high=0.9), entry(seed=1, score=0.5, low=0.4, high=0.69)]
    [found] = [caveat for caveat in caveats(entries, ()) if caveat.key == "unstable"]
    assert found.values == {"methods": "m (0.500 / 0.800)"}


def gaps(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize("key", TEXTS)
def test_both_languages_have_the_same_gaps(key: str) -> None:
    assert gaps(TEXTS[key]["en"]) == gaps(TEXTS[key]["ru"])


def test_numbers_follow_the_language() -> None:
    caveat = Caveat(key="small_test", values={"n": 1234, "width": 0.1})
    assert "n = 1,234" in caveat_text(caveat)
    assert "0.100" in caveat_text(caveat)
    assert "n = 1\u00a0234" in caveat_text(caveat, "ru")
    assert "0,100" in caveat_text(caveat, "ru")
