"""Labels that look like others misspelt: every slip of one letter is found, and nothing that is a label of its own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritune.errors import BadData
from tritune.tasks.classification import classification
from tritune.tasks.misspelt import TIMES, misspelt

LETTERS = "abcdefghijklmnopqrstuvwxyzабвгдежз"
words = st.text(LETTERS, min_size=6, max_size=12)


@st.composite
def slips(draw: st.DrawFn) -> tuple[str, str]:
    """A word, and what a slip of one letter after the first makes of it."""
    word = draw(words)
    at = draw(st.integers(1, len(word) - 1))
    letter = draw(st.sampled_from(LETTERS))
    slip = draw(
        st.sampled_from(
            [
                word[:at] + word[at + 1 :],
                word[:at] + letter + word[at:],
                word[:at] + letter + word[at + 1 :],
                word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :] if at > 1 else word + letter,
            ]
        )
    )
    return word, slip


@given(slips(), st.integers(1, 3))
def test_every_slip_is_found(pair: tuple[str, str], rows: int):
    word, slip = pair
    assert misspelt({word: rows * TIMES, slip: rows}) == ({slip: word} if slip != word else {})


@given(slips())
def test_labels_of_like_numbers_of_rows_are_both_meant(pair: tuple[str, str]):
    word, slip = pair
    assert misspelt({word: TIMES - 1, slip: 1}) == {}


@given(st.lists(words, min_size=2, max_size=2, unique=True), st.integers(1, 50))
def test_what_is_called_misspelt_is_one_edit_away(pair: list[str], rows: int):
    """Against the distance by its recurrence (Damerau-Levenshtein, restricted), the slow twin."""
    one, two = pair
    found = misspelt({one: 1000, two: rows})
    assert found == ({two: one} if one[0] == two[0] and distance(one, two) == 1 else {})


def distance(a: str, b: str) -> int:
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            best = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                best = min(best, table[i - 2, j - 2] + 1)
            table[i, j] = best
    return table[len(a), len(b)]


@pytest.mark.parametrize(
    "counts",
    [
        {"1": 500, "11": 1, "2": 400},
        {"class 1": 500, "class 2": 1},
        {"VBD": 500, "VBN": 3},
        {"moral": 500, "amoral": 3},
        {"C": 100, "C++": 2, "C#": 2},
        {"B": 100, "B-": 2, "B+": 2},
        {"negative": 500, "positive": 3, "neutral": 1},
        {"entailment": 500, "not_entailment": 3},
        {"class A": 500, "class B": 3, "Class C": 2},
        {"Stage I": 500, "Stage II": 3},
        {"fr-CA": 500, "fr-CH": 3, "zh-Hans": 400, "zh-Hant": 2},
        {"a": 500, "A": 300, "K": 2, "k": 100},
    ],
)
def test_labels_of_their_own(counts: dict[str, int]):
    assert misspelt(counts) == {}


def test_columns_of_nothing_but_different_values_are_looked_through_at_once():
    """Somebody who names the column of texts: a hundred thousand labels would be five billion pairs."""
    assert misspelt({f"review number {i}": 1 for i in range(100_000)}) == {}


def test_case_and_what_is_between_words_make_no_other_label():
    assert misspelt({"not spam": 40, "Not-Spam": 39, "not_spam": 1, "spam": 3}) == {
        "Not-Spam": "not spam",
        "not_spam": "not spam",
    }


def rows(**counts: int) -> list[dict[str, Any]]:
    return [{"text": f"{label} {i}", "label": label} for label, count in counts.items() for i in range(count)]


def test_a_training_label_misspelt_is_named_with_its_place():
    with pytest.raises(BadData) as caught:
        classification(rows(positive=20, positiv=2, negative=20), label_words={"positive": "good", "negative": "bad"})
    (problem,) = caught.value.problems
    assert problem.where == "train rows, row 21, field 'label'"
    assert "'positiv' (this row and 1 row more) looks like 'positive' (20 rows)" in problem.what


def test_named_labels_settle_it():
    named = ("negative", "positive", "positiv")
    assert classification(rows(positive=20, positiv=2, negative=20), labels=named).labels == named
    with pytest.raises(BadData, match="'positiv' is not known"):
        classification(rows(positive=20, positiv=2, negative=20), labels=named[:2])
