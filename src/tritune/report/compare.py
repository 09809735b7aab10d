"""A comparison as a table for the terminal, as markdown, and as advice in words. Pure functions of the record.

Knows no model and no training, and never asks a method for its name: baselines are told by their strategy, everything
else comes from scores, intervals and the verdicts of the paired tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tritune.evaluate.caveats import caveat_text
from tritune.evaluate.record import Comparison, Pair
from tritune.report import units
from tritune.report.rows import Row, pair_of, rows, shown_pairs
from tritune.report.words import Lang, words

#: the columns after the method's name: key of the heading, and what stands in the cell
Column = tuple[str, Callable[[Row, Lang], str]]


def _score(row: Row, lang: Lang) -> str:
    return f"{units.score(row.score, lang)} {interval(row.low, row.high, lang)}"


COLUMNS: tuple[Column, ...] = (
    ("score", _score),
    ("parameters", lambda row, lang: units.count(row.trainable_parameters or None, lang)),
    ("stored", lambda row, lang: units.size(row.stored_bytes or None, lang)),
    ("train_time", lambda row, lang: units.seconds(row.train_seconds, lang)),
    ("speed", lambda row, lang: units.rate(row.tokens_per_second, lang)),
    ("train_memory", lambda row, lang: units.size(row.train_peak_bytes, lang)),
    ("eval_memory", lambda row, lang: units.size(row.eval_peak_bytes, lang)),
    ("per_1000", lambda row, lang: units.seconds(row.seconds_per_1000_rows, lang)),
    ("forgetting", lambda row, lang: units.signed(row.forgetting, lang)),
)


def interval(low: float, high: float, lang: Lang, show: Callable[[float, Lang], str] = units.score) -> str:
    """[0.838, 0.881]; a semicolon parts the bounds where the comma is the decimal sign."""
    return f"[{show(low, lang)}{',' if lang == 'en' else ';'}{units.GAP}{show(high, lang)}]"


def metric_name(metric: str, lang: Lang) -> str:
    """The metric in words where the dictionary has it, else as it is called."""
    return words(lang).get(f"metric_{metric}", metric)


def strategy_name(strategy: str, lang: Lang) -> str:
    """The strategy in words."""
    return words(lang).get(f"strategy_{strategy}", strategy)


def verdict(pair: Pair, lang: Lang) -> str:
    """What may be said of a pair: who is better, or that no difference is shown."""
    texts = words(lang)
    return texts["better"].format(name=pair.better) if pair.better else texts["no_difference"]


def caveats(comparison: Comparison, lang: Lang) -> tuple[str, ...]:
    """The caveats in a language; records without keys have their English sentences only."""
    if len(comparison.caveat_keys) == len(comparison.caveats):
        return tuple(caveat_text(caveat, lang) for caveat in comparison.caveat_keys)
    return comparison.caveats


# ---- terminal

TERMINAL_HEADINGS = ("head_method", "head_score", "head_stored", "head_train", "head_memory", "head_1000")


def table(comparison: Comparison, lang: Lang = "en") -> Table:
    """The comparison for the terminal, two lines a row so that 80 columns hold it: baselines first, then methods."""
    texts, lines = words(lang), rows(comparison)
    note = "\n".join(part for part in (caption(lines, lang), texts["table_note"]) if part)
    shown = Table(box=SIMPLE_HEAD, caption=note, caption_justify="left", padding=(0, 1, 0, 0), show_edge=False)
    for place, heading in enumerate(TERMINAL_HEADINGS):
        shown.add_column(texts[heading], justify="right" if place else "left")
    baselines = sum(line.is_baseline for line in lines)
    for place, line in enumerate(lines, start=1):
        shown.add_row(*_terminal_cells(line, lang), end_section=place == baselines)
    return shown


def _terminal_cells(line: Row, lang: Lang) -> list[Text]:
    seeds = spread(line, lang)
    cells = [
        (line.method, strategy_name(line.strategy, lang)),
        (units.score(line.score, lang), interval(line.low, line.high, lang) + (f"\n{seeds}" if seeds else "")),
        (units.size(line.stored_bytes or None, lang), units.count(line.trainable_parameters or None, lang)),
        (units.seconds(line.train_seconds, lang), units.rate(line.tokens_per_second, lang)),
        (units.size(line.train_peak_bytes, lang), units.size(line.eval_peak_bytes, lang)),
        (units.seconds(line.seconds_per_1000_rows, lang), units.signed(line.forgetting, lang)),
    ]
    return [
        Text.assemble((upper, "bold" if place < 2 else ""), "\n", (lower, "dim"))
        for place, (upper, lower) in enumerate(cells)
    ]


def spread(row: Row, lang: Lang) -> str:
    """Lowest and highest score over the seeds; empty with one seed."""
    if row.seeds == 1:
        return ""
    low, high = row.spread
    return words(lang)["range"].format(low=units.score(low, lang), high=units.score(high, lang))


def caption(lines: Sequence[Row], lang: Lang) -> str:
    """What was measured, on how many rows, over how many seeds."""
    if not lines:
        return ""
    texts, first = words(lang), lines[0].entries[0]
    said = texts["measured_on"].format(metric=metric_name(first.metric, lang), n=units.whole(first.n, lang))
    seeds = max(line.seeds for line in lines)
    return said if seeds == 1 else f"{said} {texts['seeds_note'].format(seeds=seeds)}"


# ---- markdown


def markdown(comparison: Comparison, lang: Lang = "en") -> str:
    """The whole comparison as markdown: advice, results, pairs, caveats and the command that made it."""
    texts, lines = words(lang), rows(comparison)
    headings = [texts["method"], texts["strategy"], *(texts[heading] for heading, _ in COLUMNS)]
    body = [
        [
            line.method,
            strategy_name(line.strategy, lang),
            *(f"{cell(line, lang)} {_range(cell, line, lang)}" for _, cell in COLUMNS),
        ]
        for line in lines
    ]
    parts = [f"# {_escape(title(comparison, lang))}", recommendation(comparison, lang)]
    parts += [f"## {texts['results']}", caption(lines, lang), _markdown_table(headings, body, left=(0, 1))]
    if comparison.pairs:
        parts += [f"## {texts['pairs_title']}", texts["pairs_intro"], _markdown_pairs(comparison, lang)]
    limits = [f"- {_escape(caveat)}" for caveat in caveats(comparison, lang)]
    parts += [f"## {texts['caveats']}", "\n".join(limits) or texts["no_caveats"]]
    if comparison.command:
        parts += [f"## {texts['command']}", "\n".join(f"    {line}" for line in comparison.command.splitlines())]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(comparison: Comparison, lang: Lang) -> str:
    """A heading with the base's name where the record tells it (`base["name"]`)."""
    name = comparison.base.get("name")
    texts = words(lang)
    return texts["title"].format(base=name) if isinstance(name, str) else texts["title_plain"]


def _range(cell: Callable[[Row, Lang], str], row: Row, lang: Lang) -> str:
    shown = spread(row, lang) if cell is _score else ""
    return f"({shown})" if shown else ""


def _markdown_pairs(comparison: Comparison, lang: Lang) -> str:
    texts = words(lang)
    headings = [texts[key] for key in ("pair", "difference", "p_adjusted", "p_by_seed", "verdict")]
    body = [
        [
            f"{pair.a} − {pair.b}",
            f"{units.signed(pair.difference, lang)} {interval(pair.low, pair.high, lang, units.signed)}",
            units.p_value(pair.p_by_example if pair.p_adjusted is None else pair.p_adjusted, lang),
            units.p_value(pair.p_by_seed, lang),
            verdict(pair, lang),
        ]
        for pair in shown_pairs(comparison)
    ]
    return _markdown_table(headings, body, left=(0, len(headings) - 1))


def _markdown_table(headings: Sequence[str], body: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """A table whose columns `left` are text, the others numbers."""
    rule = ["---" if place in left else "---:" for place in range(len(headings))]
    lines = [headings, rule, *body]
    return "\n".join("| " + " | ".join(_escape(cell.strip()) for cell in line) + " |" for line in lines)


def _escape(text: str) -> str:
    """Text that can neither leave its cell nor become HTML."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


# ---- advice


def recommendation(comparison: Comparison, lang: Lang = "en") -> str:
    """Which to choose and why, as far as the tests go; says so where prompting is not shown to be beaten."""
    return " ".join(advice(comparison, lang))


def advice(comparison: Comparison, lang: Lang = "en") -> tuple[str, ...]:
    """The recommendation, sentence by sentence; the first one is the headline.

    Candidates are the trained methods that were shown to beat the best prompting. The one with the highest score leads;
    those that were not shown to be worse are tied with it, and among the tied the one that stores least is chosen.
    """
    texts, lines = words(lang), rows(comparison)
    baselines = [line for line in lines if line.is_baseline]
    trained = [line for line in lines if not line.is_baseline]
    baseline = max(baselines, key=lambda line: line.score, default=None)
    if not trained:
        return (texts["only_prompting"] if baselines else texts["nothing"],)
    candidates = trained
    if baseline is not None:
        candidates = [line for line in trained if _better(comparison, line, baseline)]
        if not candidates:
            return _prompting_is_enough(comparison, baseline, trained, lang)
    leader = max(candidates, key=lambda line: line.score)
    tied = [line for line in candidates if line is leader or not _better(comparison, leader, line)]
    pick = min(tied, key=lambda line: (line.stored_bytes, -line.score))
    said = _choice(comparison, pick, leader, tied, trained, lang)
    said += _fastest(tied, lang) if len(tied) > 1 else []
    if baseline is not None:
        said += _gain(comparison, pick, baseline, lang)
    if len(lines) > 1 and not comparison.pairs:
        said.append(texts["untested"])
    return tuple(said)


def _better(comparison: Comparison, row: Row, other: Row) -> bool:
    """Whether a test showed `row` to be better; where nothing was tested, its score has to do (`untested` says so)."""
    pair = pair_of(comparison, row.method, other.method)
    return pair.better == row.method if pair else not comparison.pairs and row.score > other.score


def _prompting_is_enough(comparison: Comparison, baseline: Row, trained: Sequence[Row], lang: Lang) -> tuple[str, ...]:
    texts, best = words(lang), max(trained, key=lambda line: line.score)
    said = [
        texts["prompting_enough"].format(name=baseline.method, score=_score(baseline, lang)),
        texts["prompting_advice"],
        texts["prompting_best_trained"].format(name=best.method, score=_score(best, lang)),
        *_hidden(comparison, best, baseline, lang),
    ]
    return tuple(said)


def _choice(
    comparison: Comparison, pick: Row, leader: Row, tied: Sequence[Row], trained: Sequence[Row], lang: Lang
) -> list[str]:
    texts, score = words(lang), _score(pick, lang)
    if len(tied) == 1:
        beaten = [line for line in trained if line is not pick and _better(comparison, pick, line)]
        clear = comparison.pairs and len(beaten) == len(trained) - 1 > 0
        return [texts["choose_clear" if clear else "choose_only"].format(name=pick.method, score=score)]
    others = ", ".join(line.method for line in tied if line is not leader)
    if pick is leader:
        return [texts["choose_leader"].format(name=pick.method, score=score, tied=others)]
    stored = units.size(pick.stored_bytes, lang)
    return [
        texts["choose_cheapest"].format(name=pick.method, score=score, stored=stored),
        texts["leader"].format(leader=leader.method, score=units.score(leader.score, lang), tied=others),
        *_hidden(comparison, pick, leader, lang),
    ]


def _hidden(comparison: Comparison, row: Row, other: Row, lang: Lang) -> list[str]:
    pair = pair_of(comparison, row.method, other.method)
    if pair is None:
        return []
    bounds = {"low": units.signed(pair.low, lang), "high": units.signed(pair.high, lang)}
    texts = words(lang)
    said = [texts["may_hide"].format(name=row.method, leader=other.method, **bounds)]
    return said if pair.low <= 0 <= pair.high else [*said, texts["pair_alone"]]


def _fastest(tied: Sequence[Row], lang: Lang) -> list[str]:
    texts = words(lang)
    trains = min(tied, key=lambda line: line.train_seconds)
    answers = min(tied, key=lambda line: line.seconds_per_1000_rows)
    train, answer = units.seconds(trains.train_seconds, lang), units.seconds(answers.seconds_per_1000_rows, lang)
    if trains is answers:
        return [texts["fastest_both"].format(name=trains.method, train=train, answer=answer)]
    return [
        texts["fastest_train"].format(name=trains.method, train=train),
        texts["fastest_answer"].format(name=answers.method, answer=answer),
    ]


def _gain(comparison: Comparison, pick: Row, baseline: Row, lang: Lang) -> list[str]:
    pair = pair_of(comparison, pick.method, baseline.method)
    if pair is None:
        return []
    shown, bounds = units.signed(pair.difference, lang), interval(pair.low, pair.high, lang, units.signed)
    return [words(lang)["gain"].format(baseline=baseline.method, difference=shown, interval=bounds)]
