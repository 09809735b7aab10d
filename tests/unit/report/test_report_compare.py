"""Table, markdown and advice say what the record says, and no more than its tests allow."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from rich.console import Console

from tritune.evaluate.record import Comparison, Entry, Pair
from tritune.report.compare import advice, markdown, recommendation, table
from tritune.report.rows import pair_of, rows
from tritune.report.words import words


def printed(comparison: Comparison, lang: str = "en", width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(comparison, lang))  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def entry(method: str, score: float, **changes: object) -> Entry:
    plain = {
        "method": method, "strategy": "prompting" if method.startswith("ask") else "adapters", "seed": 0,
        "metric": "accuracy", "score": score, "low": score - 0.02, "high": score + 0.02, "n": 1000,
        "trainable_parameters": 10, "stored_bytes": 1000, "train_seconds": 50.0, "train_tokens_per_second": 1.0,
        "train_peak_bytes": 1, "eval_peak_bytes": 1, "seconds_per_1000_rows": 10.0, "adaptation": None,
    }  # fmt: skip
    return Entry.model_validate(plain | changes)


def comparison(entries: list[Entry], better: Mapping[tuple[str, str], str]) -> Comparison:
    """Every pair is compared; `better` names the winners, all others show no difference."""
    pairs = tuple(
        Pair(a=a.method, b=b.method, difference=a.score - b.score, low=a.score - b.score - 0.01,
             high=a.score - b.score + 0.01, p_by_example=0.5, p_by_seed=None, n=1000, seeds=1, verdict="",
             better=better.get((a.method, b.method)))
        for i, a in enumerate(entries) for b in entries[i + 1 :]
    )  # fmt: skip
    return Comparison(entries=tuple(entries), pairs=pairs, caveats=())


# ---- table and markdown


@pytest.mark.parametrize("lang", ["en", "ru"])
def test_the_table_fits_a_terminal_and_loses_nothing(made: Callable[..., Any], lang: str) -> None:
    shown = printed(made(seeds=3).comparison, lang)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    for method in ("zero-shot", "few-shot", "full", "ptuning", "bottleneck", "lora"):
        assert method in shown
    assert ("9.77 MB" if lang == "en" else "9,77 МБ") in shown.replace("\u00a0", " ")


@pytest.mark.parametrize(("lang", "said"), [("en", "+0.050"), ("ru", "+0,050")])
def test_forgetting_is_shown_for_what_was_trained(made: Callable[..., Any], lang: Any, said: str) -> None:
    """The mean over seeds of a rise that may be a fall; a dash where the base stays as it is."""
    found = made(["zero-shot", "full"], seeds=3).comparison
    assert [row.forgetting for row in rows(found)] == [None, pytest.approx(0.05)]
    assert said in printed(found, lang)
    table = [line.split("|") for line in markdown(found, lang).splitlines() if line.startswith("|")]
    column = next(i for i, cell in enumerate(table[0]) if words(lang)["forgetting"] in cell)
    cells = [line[column].strip() for line in table[2:4]]
    assert cells == ["–", said]


def test_what_training_costs_is_told_by_runs_that_had_the_base_to_themselves() -> None:
    alone = entry("lora", 0.8, train_seconds=50.0, train_tokens_per_second=2.0, train_peak_bytes=7)
    shared = {"train_seconds": 10.0, "train_tokens_per_second": 10.0, "train_peak_bytes": None, "trained_beside": 1}
    beside = [entry("lora", 0.6, seed=seed, **shared) for seed in (1, 2)]
    (row,) = rows(comparison([alone, *beside], {}))
    assert (row.train_seconds, row.tokens_per_second, row.train_peak_bytes) == (50.0, 2.0, 7)
    assert row.score == pytest.approx(2 / 3)
    (row,) = rows(comparison(beside, {}))
    assert (row.train_seconds, row.tokens_per_second, row.train_peak_bytes) == (10.0, 10.0, None)


def test_baselines_come_first_whatever_the_order_of_the_record(made: Callable[..., Any]) -> None:
    found = made(["lora", "zero-shot", "full", "few-shot"]).comparison
    assert [row.method for row in rows(found)] == ["zero-shot", "few-shot", "lora", "full"]


def test_names_are_no_markup() -> None:
    assert "[red]x[/red]" in printed(comparison([entry("[red]x[/red]", 0.8)], {}), width=120)


@pytest.mark.parametrize("lang", ["en", "ru"])
def test_markdown_tables_are_even(made: Callable[..., Any], lang: str) -> None:
    text = markdown(made(seeds=2).comparison, lang)
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("|"):
            assert len({line.count("|") for line in lines}) == 1
    assert text.count("\n## ") == 4
    assert ("no difference shown" if lang == "en" else "разница не показана") in text


def test_markdown_escapes_names() -> None:
    text = markdown(comparison([entry("a|b<script>", 0.8), entry("c", 0.7)], {}))
    assert "a\\|b&lt;script>" in text


def test_a_record_without_caveat_keys_shows_its_sentences() -> None:
    found = comparison([entry("a", 0.8)], {}).model_copy(update={"caveats": ("by hand",)})
    assert "- by hand" in markdown(found, "ru")


def test_a_turned_pair_is_the_same_pair() -> None:
    found = comparison([entry("a", 0.8), entry("b", 0.7)], {("a", "b"): "a"})
    pair, turned = pair_of(found, "a", "b"), pair_of(found, "b", "a")
    assert pair is not None
    assert turned is not None
    assert (turned.difference, turned.low, turned.high) == (-pair.difference, -pair.high, -pair.low)
    assert turned.better == "a"
    assert pair_of(found, "a", "c") is None


# ---- advice

ASK = entry("ask", 0.70, stored_bytes=0, train_seconds=0.0)


def test_a_clear_winner_is_chosen() -> None:
    found = comparison([ASK, entry("a", 0.9), entry("b", 0.8)], {("ask", "a"): "a", ("ask", "b"): "b", ("a", "b"): "a"})
    said = advice(found)
    assert said[0] == "Choose a: 0.900 [0.880,\u00a00.920], better than every other method here."
    assert said[-1] == "Over prompting (ask) it gains +0.200 [+0.190,\u00a0+0.210]."


def test_among_the_tied_the_smallest_is_chosen_and_the_fastest_are_named() -> None:
    big = entry("big", 0.90, stored_bytes=10**9, seconds_per_1000_rows=5.0)
    small = entry("small", 0.89, stored_bytes=10**4, train_seconds=90.0)
    text = recommendation(comparison([ASK, big, small], {("ask", "big"): "big", ("ask", "small"): "small"}))
    assert text.startswith("Choose small:")
    assert "The highest score is big's (0.900), but no difference was shown to small." in text
    assert "How far small may really lie from big (95 %): −0.020 to 0.000." in text
    assert "big is the fastest both to train (50 s) and to answer (5 s per 1,000 rows)" in text.replace("\u00a0", " ")


@pytest.mark.parametrize(("score", "said"), [(0.88, True), (0.895, False)])
def test_an_interval_that_leaves_out_zero_does_not_stand_there_alone(score: float, said: bool) -> None:
    """The verdict is corrected for all pairs and the interval is not: without a word they contradict each other."""
    big, small = entry("big", 0.90, stored_bytes=10**9), entry("small", score, stored_bytes=10**4)
    text = recommendation(comparison([ASK, big, small], {("ask", "big"): "big", ("ask", "small"): "small"}))
    assert text.startswith("Choose small:")
    assert ("That interval is of this pair alone and leaves out zero" in text) is said


def test_the_fastest_are_named_apart_when_they_differ() -> None:
    slow, quick = entry("slow", 0.9, seconds_per_1000_rows=5.0), entry("quick", 0.89, train_seconds=9.0)
    text = recommendation(comparison([slow, quick], {}))
    assert "Fastest to train among them: quick" in text
    assert "Fastest to answer: slow" in text


def test_the_leader_is_chosen_when_it_is_the_smallest_too() -> None:
    found = comparison([ASK, entry("a", 0.9, stored_bytes=1), entry("b", 0.89)], {("ask", "a"): "a", ("ask", "b"): "b"})
    assert "the least to store among those that no difference was shown to (b)" in advice(found)[0]


def test_a_method_that_does_not_beat_prompting_is_never_advised() -> None:
    cheap = entry("cheap", 0.72, stored_bytes=1)
    good = entry("good", 0.75)
    assert advice(comparison([ASK, cheap, good], {("ask", "good"): "good"}))[0].startswith("Choose good: 0.750")


def test_when_nothing_beats_prompting_it_says_so() -> None:
    text = recommendation(comparison([ASK, entry("a", 0.71)], {}))
    assert text.startswith("No method was shown to be better than prompting (ask, 0.700")
    assert "The best trained method is a (0.710" in text


def test_the_best_prompting_is_the_one_to_beat() -> None:
    strong = entry("ask more", 0.88, stored_bytes=0)
    found = comparison([ASK, strong, entry("a", 0.89)], {("ask", "a"): "a"})
    assert recommendation(found).startswith("No method was shown to be better than prompting (ask more")


@pytest.mark.parametrize("lang", ["en", "ru"])
def test_every_case_has_words(lang: str) -> None:
    cases = [[], [ASK], [entry("a", 0.8)], [ASK, entry("a", 0.8)], [entry("a", 0.8), entry("b", 0.8)]]
    assert all(advice(comparison(entries, {}), lang)[0] for entries in cases)  # type: ignore[arg-type]


def test_without_tests_the_text_says_that_nothing_is_shown() -> None:
    untested = Comparison(entries=(ASK, entry("a", 0.9)), pairs=(), caveats=())
    assert advice(untested)[-1].startswith("No paired tests were made")
    assert "better than every other" not in recommendation(untested)
