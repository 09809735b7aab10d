"""Errors per label: how each label of a classification fares, and who is taken for whom.

Pure function of results; knows no model, no file and no way of showing anything. scikit-learn is imported when needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tritune.evaluate.record import ExampleResult


@dataclass(frozen=True, slots=True)
class LabelScore:
    """How one label fares. Fractions; `support` counts the examples that truly carry it."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class LabelReport:
    """All labels of one method. `confusion[i][j]` counts examples of `labels[i]` that were answered `labels[j]`."""

    labels: tuple[LabelScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    macro_f1: float

    def confused(self) -> tuple[tuple[str, str, int], ...]:
        """(right label, wrong answer, how often), most frequent first."""
        names = [score.label for score in self.labels]
        cells = [
            (gold, answer, count)
            for gold, row in zip(names, self.confusion, strict=True)
            for answer, count in zip(names, row, strict=True)
            if count and gold != answer
        ]
        return tuple(sorted(cells, key=lambda cell: (-cell[2], cell[0], cell[1])))


def per_label(results: Sequence[ExampleResult]) -> LabelReport:
    """Precision, recall, F1 and support of every label, and who is taken for whom (by scikit-learn).

    Labels are sorted; an answer that is nobody's right label counts as a label of support 0. The results of several
    seeds may be given one after the other. What is undefined (precision of a label never answered) is 0. `macro_f1`
    is the mean over the labels that do occur.

    Raises:
        ValueError: there are no results.
    """
    if not results:
        raise ValueError("errors per label need at least one result")
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    gold, answers = [row.gold for row in results], [row.predicted for row in results]
    names = sorted({*gold, *answers})
    columns = precision_recall_fscore_support(gold, answers, labels=names, zero_division=0)
    scores = tuple(
        LabelScore(name, float(precision), float(recall), float(f1), int(support))
        for name, precision, recall, f1, support in zip(names, *columns, strict=True)
    )
    counts = confusion_matrix(gold, answers, labels=names)
    occurring = [score.f1 for score in scores if score.support]
    return LabelReport(
        labels=scores,
        confusion=tuple(tuple(int(count) for count in row) for row in counts),
        macro_f1=sum(occurring) / len(occurring),
    )
