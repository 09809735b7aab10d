"""Rows that are there twice: a copied row is found, two questions about one sentence are not taken for a copy."""

from __future__ import annotations

from tritune.tasks.base import Example
from tritune.tasks.duplicates import near_duplicates, repeated, shared_rows
from tritune.tasks.rows import Table


def table(name: str, *rows: tuple[str, str, dict[str, str]]) -> Table:
    found = Table(name)
    for number, (text, label, rest) in enumerate(rows, 2):
        found.examples.append(Example(f"{name}{number}", f"{name}, line {number}", {"text": text}, label))
        found.rest.append(rest)
    return found


def test_same_text_is_the_same_row_whatever_its_label():
    train = table("train.csv", ("one", "a", {}), ("two", "b", {}))
    test = table("test.csv", ("two", "a", {}), ("three", "a", {}))
    assert [(p.where, p.what) for p in shared_rows(train, test)] == [
        ("test.csv, line 2", "the same row is in train.csv too (train.csv, line 3)")
    ]


def test_a_column_that_numbers_the_rows_does_not_tell_rows_apart():
    train = table("train", *((f"t{i}", "a", {"id": str(i), "topic": "x"}) for i in range(4)))
    test = table("test", ("t1", "a", {"id": "90", "topic": "x"}), ("new", "a", {"id": "91", "topic": "x"}))
    assert [p.where for p in shared_rows(train, test)] == ["test, line 2"]


def test_rows_that_ask_something_else_about_one_sentence_are_not_the_same_row():
    train = table("train", ("s", "a", {"entity": "x"}), ("s", "b", {"entity": "y"}), ("r", "b", {"entity": "y"}))
    test = table("test", ("s", "a", {"entity": "z"}), ("q", "a", {"entity": "z"}))
    assert shared_rows(train, test) == []
    assert near_duplicates(train.examples, test.examples) == 1


def test_near_duplicates_look_past_case_space_and_punctuation():
    train = table("train", ("A plain text.", "a", {}), ("👍", "a", {})).examples
    test = table("test", ("a  plain, text", "a", {}), ("👎", "a", {}), ("another", "a", {})).examples
    assert near_duplicates(train, test) == 1


def test_repeats_within_a_split():
    rows = table("train", ("x", "a", {}), ("x", "a", {}), ("x", "b", {}), ("y", "a", {})).examples
    assert repeated(rows) == (2, 1)
