"""What limits a comparison, found by code from its own records and said in words, in English and Russian.

Each check looks at the records and returns `Caveat`s: a key and numbers. `TEXTS` turns them into sentences, so every
language shows the same limits. Knows no model and no file; a check never asks which method it is looking at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Literal

from tritune.evaluate.record import ALPHA, Caveat, Entry, ExampleResult, Pair
from tritune.spec import Strategy

Lang = Literal["en", "ru"]

#: a 95 % interval wider than this hides differences that people care about (0.05 is about 1,000 rows at 0.8)
WIDE = 0.05
#: fewer dev rows than this choose a learning rate and a step mostly by luck
FEW_DEV_ROWS = 200
#: a grid of so many learning rates has none that is not at an edge
ALL_EDGES = 2
#: below this many seeds a t-test over seeds has little power
FEW_SEEDS = 5

TEXTS: Mapping[str, Mapping[Lang, str]] = {
    "one_seed": {
        "en": "One seed: every method was trained once, so how much a score changes from run to run is not known.",
        "ru": "Один запуск (seed): каждый метод обучен один раз, и насколько оценка меняется от запуска к запуску, "
        "неизвестно.",
    },
    "few_seeds": {
        "en": "Few seeds ({seeds} per method): the test by seed can miss differences that are real.",
        "ru": "Мало запусков (seed: {seeds} на метод): критерий по запускам может не заметить настоящей разницы.",
    },
    "seeds_undecided": {
        "en": "Shown by example, but not by seed: {pairs}. Another training run may turn out differently.",
        "ru": "Разница видна по примерам, но не по запускам: {pairs}. Новое обучение может дать другой итог.",
    },
    "seeds_contradict": {
        "en": "Shown by example, but in one of the seeds it is the other way round: {pairs}. It counts as not shown.",
        "ru": "Разница видна по примерам, но в одном из запусков она обратная: {pairs}. Она не считается показанной.",
    },
    "unstable": {
        "en": "Seeds further apart than chance on the test rows explains: {methods}. Some runs failed to learn what others "
        "did; a lower learning rate may hold them together.",
        "ru": "Запуски расходятся сильнее, чем объяснила бы случайность тестовых строк: {methods}. Часть запусков не "
        "выучила того, что другие; меньшая скорость обучения может это исправить.",
    },
    "small_test": {
        "en": "Small test set (n = {n}): the 95 % interval of a score is up to {width} wide; smaller differences are "
        "easily missed.",
        "ru": "Мало тестовых примеров (n = {n}): ширина 95-процентного интервала оценки доходит до {width}, и разницу "
        "меньше этой легко не заметить.",
    },
    "small_dev": {
        "en": "Few dev rows ({n}): learning rate and best step were chosen on them, partly by luck.",
        "ru": "Мало строк для настройки (dev: {n}): по ним выбраны скорость обучения и лучший шаг, отчасти случайно.",
    },
    "no_search": {
        "en": "No search: every method was trained with the learning rate it was given.",
        "ru": "Перебора не было: каждый метод обучен с той скоростью обучения, которая была задана.",
    },
    "search_equal": {
        "en": "Only the learning rate was searched, with one budget for all methods ({rates} rates, {steps} steps in "
        "all); all other settings are defaults or yours.",
        "ru": "Перебиралась только скорость обучения, для всех методов поровну (значений: {rates}, шагов всего: "
        "{steps}); остальные настройки взяты по умолчанию или заданы вами.",
    },
    "search_unequal": {
        "en": "Unequal search: the methods did not get the same number of trial steps ({budgets}).",
        "ru": "Неравный перебор: методам досталось разное число пробных шагов ({budgets}).",
    },
    "grid_low": {
        "en": "The best learning rate is the lowest of the grid: {methods}. A lower one may do better.",
        "ru": "Лучшая скорость обучения оказалась наименьшей из перебранных: {methods}. Возможно, лучше ещё меньшая.",
    },
    "grid_high": {
        "en": "The best learning rate is the highest of the grid: {methods}. A higher one may do better.",
        "ru": "Лучшая скорость обучения оказалась наибольшей из перебранных: {methods}. Возможно, лучше ещё большая.",
    },
    "small_grid": {
        "en": "The learning rate was chosen from {rates} rates only, so the best one lies at an edge in any case; a wider "
        "grid (--rates) may hold a better one.",
        "ru": "Скорость обучения выбиралась всего из {rates} значений, так что лучшее в любом случае на краю сетки; более "
        "широкая сетка (--rates) может дать лучшее.",
    },
    "still_improving": {
        "en": "Best at the very last evaluation: {methods}. Longer training may still help, and not all equally.",
        "ru": "Лучший результат пришёлся на самую последнюю проверку: {methods}. Более долгое обучение может ещё "
        "помочь, и не всем одинаково.",
    },
    "train_subset": {
        "en": "Trained on {used} of {available} training rows: with all of them the order may change.",
        "ru": "Обучение шло на части данных (строк: {used} из {available}): на всех данных порядок может измениться.",
    },
    "near_duplicates": {
        "en": "Near-duplicates: {n} test rows nearly equal training rows, which flatters every trained method.",
        "ru": "Почти повторы: тестовых строк, почти совпадающих с обучающими, — {n}; это завышает оценки всех "
        "обученных методов.",
    },
    "no_baseline": {
        "en": "No baseline: plain prompting was not measured, so what training brings is not known.",
        "ru": "Нет точки отсчёта: запрос без обучения не измерен, и что даёт обучение, неизвестно.",
    },
    "not_above_baseline": {
        "en": "Not shown to be better than prompting ({baseline}): {methods}.",
        "ru": "Не показано, что лучше запроса без обучения ({baseline}): {methods}.",
    },
    "majority": {
        "en": "No better than always answering the most frequent label ({score}): {methods}.",
        "ru": "Не лучше, чем всегда отвечать самой частой меткой ({score}): {methods}.",
    },
}


def caveats(
    entries: Sequence[Entry],
    pairs: Sequence[Pair],
    *,
    results: Mapping[str, Mapping[int, Sequence[ExampleResult]]] | None = None,
    dev_rows: int | None = None,
    train_rows_available: int | None = None,
    near_duplicates: int = 0,
) -> tuple[Caveat, ...]:
    """Everything that limits this comparison, the gravest kind first.

    Args:
        entries, pairs: the comparison so far.
        results: the answers per method and seed, if the most frequent label is to be looked at as well.
        dev_rows: rows that the learning rate and the best step were chosen on.
        train_rows_available: rows that could have been trained on; more than an entry used is a caveat.
        near_duplicates: test rows that nearly equal a training row.
    """
    found = chain(
        _baseline(entries, pairs),
        _majority(results or {}),
        _near_duplicates(near_duplicates),
        _seeds(entries, pairs),
        _unstable(entries),
        _test_size(entries),
        _dev_size(dev_rows),
        _train_rows(entries, train_rows_available),
        _grid_edges(entries),
        _still_improving(entries),
        _small_grid(entries),
        _search_budgets(entries),
    )
    return tuple(found)


def caveat_text(caveat: Caveat, lang: Lang = "en") -> str:
    """The sentence for a caveat.

    Raises:
        KeyError: a key or value that `TEXTS` does not know; a caveat never comes from user input.
    """
    return TEXTS[caveat.key][lang].format_map({name: _shown(value, lang) for name, value in caveat.values.items()})


def _shown(value: str | float, lang: Lang) -> str:
    if isinstance(value, str):
        return value
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    return text if lang == "en" else text.replace(",", "\u00a0").replace(".", ",")


# ---- the checks


def _trained(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries of each trained method, in the order of the comparison."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.strategy != Strategy.PROMPTING:
            grouped.setdefault(entry.method, []).append(entry)
    return grouped


def _score(entries: Sequence[Entry]) -> float:
    return sum(entry.score for entry in entries) / len(entries)


def _baseline(entries: Sequence[Entry], pairs: Sequence[Pair]) -> Iterator[Caveat]:
    trained = _trained(entries)
    prompting = [entry for entry in entries if entry.strategy == Strategy.PROMPTING]
    if not prompting:
        yield Caveat(key="no_baseline")
        return
    best = max(prompting, key=lambda entry: entry.score)
    better = {frozenset((pair.a, pair.b)): pair.better for pair in pairs}
    tied = [
        name
        for name, own in trained.items()
        # without a test the plain scores have to decide
        if better.get(frozenset((name, best.method)), name if _score(own) > best.score else None) != name
    ]
    if tied:
        yield Caveat(key="not_above_baseline", values={"baseline": best.method, "methods": ", ".join(tied)})


def _majority(results: Mapping[str, Mapping[int, Sequence[ExampleResult]]]) -> Iterator[Caveat]:
    """Only where a score is being right (1) or wrong (0): a share of labels says nothing about other scores."""
    beaten, share = [], 0.0
    for method, seeds in results.items():
        rows = list(chain.from_iterable(seeds.values()))
        if not rows or any(row.score != (row.gold == row.predicted) for row in rows):
            continue
        share = Counter(row.gold for row in rows).most_common(1)[0][1] / len(rows)
        if sum(row.score for row in rows) / len(rows) <= share:
            beaten.append(method)
    if beaten:
        yield Caveat(key="majority", values={"score": share, "methods": ", ".join(beaten)})


def _near_duplicates(n: int) -> Iterator[Caveat]:
    if n:
        yield Caveat(key="near_duplicates", values={"n": n})


def _seeds(entries: Sequence[Entry], pairs: Sequence[Pair]) -> Iterator[Caveat]:
    counts = [len({entry.seed for entry in own}) for own in _trained(entries).values()]
    if not counts:
        return
    if min(counts) == 1:
        yield Caveat(key="one_seed")
    elif min(counts) < FEW_SEEDS:
        yield Caveat(key="few_seeds", values={"seeds": min(counts)})
    undecided = [pair for pair in pairs if pair.better and pair.p_by_seed is not None and pair.p_by_seed >= 0.05]
    if undecided:
        yield Caveat(key="seeds_undecided", values={"pairs": ", ".join(f"{pair.a} / {pair.b}" for pair in undecided)})

    contradicted = [
        pair for pair in pairs if not pair.better and (1.0 if pair.p_adjusted is None else pair.p_adjusted) < ALPHA
    ]
    if contradicted:
        yield Caveat(
            key="seeds_contradict", values={"pairs": ", ".join(f"{pair.a} / {pair.b}" for pair in contradicted)}
        )


def _unstable(entries: Sequence[Entry]) -> Iterator[Caveat]:
    """Where the intervals of two seeds do not touch."""
    apart = [
        f"{method} ({min(scores):.3f} / {max(scores):.3f})"
        for method, own in _trained(entries).items()
        if max(entry.low for entry in own) > min(entry.high for entry in own)
        for scores in [[entry.score for entry in own]]
    ]
    if apart:
        yield Caveat(key="unstable", values={"methods": ", ".join(apart)})


def _test_size(entries: Sequence[Entry]) -> Iterator[Caveat]:
    widest = max(entries, key=lambda entry: entry.high - entry.low, default=None)
    if widest is not None and widest.high - widest.low > WIDE:
        yield Caveat(key="small_test", values={"n": widest.n, "width": widest.high - widest.low})


def _dev_size(rows: int | None) -> Iterator[Caveat]:
    if rows is not None and rows < FEW_DEV_ROWS:
        yield Caveat(key="small_dev", values={"n": rows})


def _train_rows(entries: Sequence[Entry], available: int | None) -> Iterator[Caveat]:
    used = [entry.train_rows for own in _trained(entries).values() for entry in own if entry.train_rows]
    if available is not None and used and min(used) < available:
        yield Caveat(key="train_subset", values={"used": min(used), "available": available})


def _grid_edges(entries: Sequence[Entry]) -> Iterator[Caveat]:
    low, high = [], []
    for method, own in _trained(entries).items():
        points = own[0].search
        rates = {point.learning_rate for point in points}
        chosen = next((point.learning_rate for point in points if point.chosen), None)
        if chosen is None or len(rates) <= ALL_EDGES:
            continue
        if chosen == min(rates):
            low.append(f"{method} ({chosen:g})")
        elif chosen == max(rates):
            high.append(f"{method} ({chosen:g})")
    if low:
        yield Caveat(key="grid_low", values={"methods": ", ".join(low)})
    if high:
        yield Caveat(key="grid_high", values={"methods": ", ".join(high)})


def _small_grid(entries: Sequence[Entry]) -> Iterator[Caveat]:
    """Once for all methods, in place of an edge under each: there is nothing but edges."""
    grids = [len({point.learning_rate for point in own[0].search}) for own in _trained(entries).values()]
    small = [rates for rates in grids if 1 < rates <= ALL_EDGES]
    if small:
        yield Caveat(key="small_grid", values={"rates": max(small)})


def _still_improving(entries: Sequence[Entry]) -> Iterator[Caveat]:
    methods = [
        method
        for method, own in _trained(entries).items()
        if all(entry.curve and entry.best_step == max(point.step for point in entry.curve) for entry in own)
    ]
    if methods:
        yield Caveat(key="still_improving", values={"methods": ", ".join(methods)})


def _search_budgets(entries: Sequence[Entry]) -> Iterator[Caveat]:
    searches = {method: own[0].search for method, own in _trained(entries).items()}
    budgets = {method: (len(points), sum(point.steps for point in points)) for method, points in searches.items()}
    if not budgets:
        return
    rates, steps = next(iter(budgets.values()))
    if len(set(budgets.values())) > 1:
        text = ", ".join(
            f"{method}: {own} x {total / own:g}" if own else f"{method}: 0" for method, (own, total) in budgets.items()
        )
        yield Caveat(key="search_unequal", values={"budgets": text})
    elif rates < 2:
        yield Caveat(key="no_search")
    else:
        yield Caveat(key="search_equal", values={"rates": rates, "steps": steps})
