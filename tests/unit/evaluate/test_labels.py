"""Errors per label against scikit-learn's own report and against counting by hand."""

from __future__ import annotations

import random

import pytest
from sklearn.metrics import classification_report, f1_score

from tritune.evaluate.labels import per_label
from tritune.evaluate.record import ExampleResult


def results(pairs: list[tuple[str, str]]) -> list[ExampleResult]:
    return [
        ExampleResult(id=str(i), text="", gold=gold, predicted=answer, score=float(gold == answer))
        for i, (gold, answer) in enumerate(pairs)
    ]


def test_agrees_with_the_library() -> None:
    rng = random.Random(1)
    pairs = [(rng.choice("abcd"), rng.choice("abcd")) for _ in range(200)]
    report, oracle = per_label(results(pairs)), classification_report(*zip(*pairs, strict=True), output_dict=True)
    for label in report.labels:
        expected = oracle[label.label]
        assert (label.precision, label.recall, label.f1, label.support) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"], expected["support"])
        )
    assert report.macro_f1 == pytest.approx(f1_score(*zip(*pairs, strict=True), average="macro"))


def test_confusion_counts_right_labels_in_rows() -> None:
    report = per_label(results([("да", "да"), ("да", "нет"), ("да", "нет"), ("нет", "да")]))
    assert [label.label for label in report.labels] == ["да", "нет"]
    assert report.confusion == ((1, 2), (1, 0))
    assert report.confused() == (("да", "нет", 2), ("нет", "да", 1))


def test_an_answer_that_is_no_label_is_a_label_without_rows() -> None:
    report = per_label(results([("a", "a"), ("b", "<script>")]))
    strange = report.labels[0]
    assert (strange.label, strange.support, strange.recall) == ("<script>", 0, 0.0)
    assert report.macro_f1 == pytest.approx(0.5)  # over a and b only


def test_nothing_is_not_a_report() -> None:
    with pytest.raises(ValueError, match="at least one"):
        per_label([])
