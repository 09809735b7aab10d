"""The comparison as one web page that needs nothing else: no network, no script, no other file.

Puts the record into words, tables and plots and lets `report.html` lay them out; whatever a user wrote is escaped by
the template engine. Knows no model and no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from tritune.evaluate.labels import LabelReport, LabelScore, per_label
from tritune.evaluate.record import Comparison, ExampleResult
from tritune.report import plots, samples, units
from tritune.report.compare import COLUMNS, advice, caption, caveats, interval, spread, strategy_name, title, verdict
from tritune.report.facts import facts
from tritune.report.rows import Row, rows, shown_pairs
from tritune.report.words import Lang, words

Examples = Mapping[str, Mapping[int, Sequence[ExampleResult]]]

#: a confusion matrix with more labels than this is no longer readable; then the most frequent mistakes are listed
MATRIX_LABELS = 12
LISTED_LABELS = 40
LISTED_MISTAKES = 12
#: characters of a test row that are shown; the page says how many follow
SHOWN_TEXT = 600


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the result table, ready to be shown; `low`, `mid` and `high` place the bar, in per cent."""

    row: Row
    colour: str
    strategy: str
    score: str
    interval: str
    spread: str
    cells: tuple[str, ...]
    low: float
    mid: float
    high: float


@dataclass(frozen=True, slots=True)
class Errors:
    """The errors of one method, ready to be shown."""

    method: str
    colour: str
    score: str
    report: LabelReport
    shown: Sequence[LabelScore]
    hidden: int
    matrix: bool
    best: bool
    mistakes: Sequence[tuple[str, str, int]]

    def shade(self, gold: int, answer: int) -> float:
        """Share of a label's rows that got this answer: 0 to 1."""
        return self.report.confusion[gold][answer] / max(1, sum(self.report.confusion[gold]))


@dataclass(frozen=True, slots=True)
class Text:
    """A test row's text, cut where it is very long; `more` counts what was cut."""

    shown: str
    more: int


def html(comparison: Comparison, examples: Examples, lang: Lang = "en") -> str:
    """The page of a comparison.

    Args:
        comparison: the record that `comparison.json` holds.
        examples: method -> seed -> answers in test order; a method without any is left out of errors and examples.
        lang: language of everything but the user's own texts, names of labels and raw settings.
    """
    from jinja2 import Environment, StrictUndefined

    texts, lines = words(lang), rows(comparison)
    said = advice(comparison, lang)
    source = files("tritune.report").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(
        t=texts,
        lang=lang,
        units=units,
        pair_interval=lambda low, high: interval(low, high, lang, units.signed),
        verdict=lambda pair: verdict(pair, lang),
        clipped=clipped,
        facts=lambda document: facts(document, lang),
    )
    methods = [line.method for line in lines]
    best = max(lines, key=lambda line: line.score, default=None)
    trained = [line.method for line in lines if not line.is_baseline]
    return environment.from_string(source).render(
        comparison=comparison,
        title=title(comparison, lang),
        headline=said[0],
        advice=said[1:],
        caption=caption(lines, lang),
        headings=[texts[key] for key, _ in COLUMNS[1:]],
        lines=result_lines(lines, lang),
        figures=figures(comparison, lang),
        pairs=shown_pairs(comparison),
        errors=[errors(row, examples, lang, best=row is best) for row in lines if _answers(row, examples)],
        disagreements=samples.disagreements(examples, methods, trained if len(trained) > 1 else methods),
        all_wrong=samples.all_wrong(examples, methods),
        methods=[method for method in methods if examples.get(method)],
        caveats=caveats(comparison, lang),
        searched=[row for row in lines if row.entries[0].search],
        trained=[row for row in lines if not row.is_baseline],
        made_of=[(texts[key], value) for key, value in _origin(comparison).items() if value],
    )


def _origin(comparison: Comparison) -> dict[str, Mapping[str, object]]:
    """Where the figures come from, by key of the heading."""
    made = comparison
    return {"base": made.base, "task": made.task, "training": made.training, "environment": made.environment}


def result_lines(lines: Sequence[Row], lang: Lang) -> list[Line]:
    """The result table; all bars share one scale that reaches from the lowest to the highest bound."""
    bottom = min((row.low for row in lines), default=0.0)
    width = max((row.high for row in lines), default=1.0) - bottom or 1.0
    return [
        Line(
            row=row,
            colour=plots.colour(row),
            strategy=strategy_name(row.strategy, lang),
            score=units.score(row.score, lang),
            interval=interval(row.low, row.high, lang),
            spread=spread(row, lang),
            cells=tuple(cell(row, lang) for _, cell in COLUMNS[1:]),
            low=100 * (row.low - bottom) / width,
            mid=100 * (row.score - bottom) / width,
            high=100 * (row.high - bottom) / width,
        )
        for row in lines
    ]


def figures(comparison: Comparison, lang: Lang) -> dict[str, list[tuple[str, str]]]:
    """Per section of the page, (heading, SVG) of the plots that there is something to draw for."""
    texts = words(lang)
    drawn = {
        "curves": [
            (texts["dev_score"], plots.dev_curves(comparison, lang)),
            (texts["train_loss"], plots.loss_curves(comparison, lang)),
        ],
        "cost": [
            (texts["by_bytes"], plots.score_by_bytes(comparison, lang)),
            (texts["by_seconds"], plots.score_by_seconds(comparison, lang)),
        ],
    }
    return {section: [plot for plot in found if plot[1]] for section, found in drawn.items()}


def errors(row: Row, examples: Examples, lang: Lang, *, best: bool) -> Errors:
    """The errors of one method per label, all its seeds together."""
    report = per_label(_answers(row, examples))
    return Errors(
        method=row.method,
        colour=plots.colour(row),
        score=words(lang)["macro"].format(f1=units.score(report.macro_f1, lang)),
        report=report,
        shown=report.labels[:LISTED_LABELS],
        hidden=max(0, len(report.labels) - LISTED_LABELS),
        matrix=len(report.labels) <= MATRIX_LABELS,
        best=best,
        mistakes=report.confused()[:LISTED_MISTAKES],
    )


def _answers(row: Row, examples: Examples) -> list[ExampleResult]:
    return [answer for answers in examples.get(row.method, {}).values() for answer in answers]


def clipped(text: str) -> Text:
    """The text as far as it is shown."""
    return Text(text[:SHOWN_TEXT], max(0, len(text) - SHOWN_TEXT))
