"""Each strategy in plain words, for somebody who meets it for the first time; with a run's own figures when given one.

The texts are markdown files beside this module, one per strategy and language. Entries belong to a text by their
strategy alone, so a new method needs no line here. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Literal

from tritune.evaluate.record import Comparison
from tritune.report import units
from tritune.report.compare import interval, metric_name, recommendation, verdict
from tritune.report.rows import Row, pair_of, rows
from tritune.report.words import Lang, words
from tritune.spec import Strategy

Explained = Literal["full", "p-tuning", "adapters"]


def explain(strategy: Explained | None = None, lang: Lang = "en", comparison: Comparison | None = None) -> str:
    """A strategy in plain words (None: all of them in short), as markdown.

    Args:
        strategy: value of `Strategy`; prompting is part of the overview.
        lang: "en" or "ru".
        comparison: a run whose figures are to be told as well.

    Raises:
        ValueError: no such strategy, or no such language.
    """
    texts = words(lang)
    wanted = Strategy(strategy) if strategy else None
    if wanted == Strategy.PROMPTING:
        raise ValueError("prompting is explained in the overview: explain(None)")
    name = f"{wanted or 'overview'}.md"
    text = files("tritune.report").joinpath("texts", lang, name).read_text(encoding="utf-8").strip()
    if comparison is None:
        return text + "\n"
    every = rows(comparison)
    own = [row for row in every if wanted is None or row.strategy == wanted]
    if wanted is None:
        told = [*(f"- {_figures(row, lang)}" for row in own), recommendation(comparison, lang)]
    else:
        told = [_figures(row, lang) + _against(row, every, comparison, lang) for row in own]
    return "\n\n".join([text, f"## {texts['this_run']}", *(told or [texts["no_entries"]])]) + "\n"


def _figures(row: Row, lang: Lang) -> str:
    return words(lang)["figures_prompting" if row.is_baseline else "figures"].format(
        name=row.method,
        metric=metric_name(row.entries[0].metric, lang),
        score=units.score(row.score, lang),
        low=units.score(row.low, lang),
        high=units.score(row.high, lang),
        n=units.whole(row.n, lang),
        parameters=units.count(row.trainable_parameters, lang),
        stored=units.size(row.stored_bytes, lang),
        train=units.seconds(row.train_seconds, lang),
        answer=units.seconds(row.seconds_per_1000_rows, lang),
    )


def _against(row: Row, every: Sequence[Row], comparison: Comparison, lang: Lang) -> str:
    """How the row compares with the best row of every other strategy; nothing for a baseline."""
    if row.is_baseline:
        return ""
    best: dict[str, Row] = {}
    for other in every:
        if other.strategy != row.strategy and (other.strategy not in best or other.score > best[other.strategy].score):
            best[other.strategy] = other
    pairs = [pair for other in best.values() if (pair := pair_of(comparison, row.method, other.method))]
    lines = [
        words(lang)["against"].format(
            other=pair.b,
            difference=units.signed(pair.difference, lang),
            interval=interval(pair.low, pair.high, lang, units.signed),
            verdict=verdict(pair, lang),
        )
        for pair in pairs
    ]
    return "".join(["\n", *(f"\n- {line}" for line in lines)]) if lines else ""
