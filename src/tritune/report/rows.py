"""The lines of a comparison: the entries of one method over its seeds together, in the order that every view shows.

Prompting comes first (it is the baseline), then the methods as the comparison lists them. Order and colour come from
the data alone; no line is ever told apart by its method's name. Knows no way of showing anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tritune.evaluate.record import Comparison, Entry, Pair
from tritune.spec import Strategy


@dataclass(frozen=True, slots=True)
class Row:
    """One method over its seeds: means of what was measured, peaks the highest; time of training and memory are those of the
    runs that had the base to themselves.

    `index` is its place among the baselines or among the methods; plots choose colour and marker by it.
    """

    index: int
    entries: tuple[Entry, ...]

    @property
    def method(self) -> str:
        return self.entries[0].method

    @property
    def strategy(self) -> str:
        return self.entries[0].strategy

    @property
    def is_baseline(self) -> bool:
        return self.strategy == Strategy.PROMPTING

    @property
    def seeds(self) -> int:
        return len(self.entries)

    @property
    def score(self) -> float:
        return _mean([entry.score for entry in self.entries])

    @property
    def low(self) -> float:
        """Mean of the seeds' lower bounds: the interval of one typical run, not of the mean."""
        return _mean([entry.low for entry in self.entries])

    @property
    def high(self) -> float:
        """Mean of the seeds' upper bounds."""
        return _mean([entry.high for entry in self.entries])

    @property
    def spread(self) -> tuple[float, float]:
        """Lowest and highest score of the seeds."""
        scores = [entry.score for entry in self.entries]
        return min(scores), max(scores)

    @property
    def n(self) -> int:
        return self.entries[0].n

    @property
    def trainable_parameters(self) -> int:
        return self.entries[0].trainable_parameters

    @property
    def stored_bytes(self) -> int:
        return max(entry.stored_bytes for entry in self.entries)

    @property
    def _by_themselves(self) -> list[Entry]:
        """Runs that shared no pass with others, but for the search: what training costs whoever wants one."""
        return [entry for entry in self.entries if not entry.trained_beside] or list(self.entries)

    @property
    def train_seconds(self) -> float:
        return _mean([entry.train_seconds for entry in self._by_themselves])

    @property
    def tokens_per_second(self) -> float | None:
        own = [entry.train_tokens_per_second for entry in self._by_themselves]
        known = [speed for speed in own if speed is not None]
        return _mean(known) if known else None

    @property
    def train_peak_bytes(self) -> int | None:
        return max(
            (entry.train_peak_bytes for entry in self.entries if entry.train_peak_bytes is not None), default=None
        )

    @property
    def eval_peak_bytes(self) -> int:
        return max(entry.eval_peak_bytes for entry in self._by_themselves)

    @property
    def forgetting(self) -> float | None:
        """Mean over the seeds; None where the base stays as it is."""
        known = [entry.forgetting for entry in self.entries if entry.forgetting is not None]
        return _mean(known) if known else None

    @property
    def seconds_per_1000_rows(self) -> float:
        return _mean([entry.seconds_per_1000_rows for entry in self.entries])


def rows(comparison: Comparison) -> tuple[Row, ...]:
    """Baselines, then methods; each in the order of the comparison's entries."""
    grouped: dict[str, list[Entry]] = {}
    for entry in comparison.entries:
        grouped.setdefault(entry.method, []).append(entry)
    kinds: tuple[list[Row], list[Row]] = ([], [])
    for own in grouped.values():
        kind = kinds[own[0].strategy != Strategy.PROMPTING]
        kind.append(Row(len(kind), tuple(own)))
    return (*kinds[0], *kinds[1])


def pair_of(comparison: Comparison, a: str, b: str) -> Pair | None:
    """The pair of these two with `a` first, whichever way it was stored; None when they were not compared."""
    for pair in comparison.pairs:
        if (pair.a, pair.b) == (a, b):
            return pair
        if (pair.a, pair.b) == (b, a):
            return turned(pair)
    return None


def shown_pairs(comparison: Comparison) -> tuple[Pair, ...]:
    """Every pair with the higher score first, so that differences read as "how much better"."""
    return tuple(pair if pair.difference >= 0 else turned(pair) for pair in comparison.pairs)


def turned(pair: Pair) -> Pair:
    """The same pair seen from the other side."""
    return pair.model_copy(
        update={"a": pair.b, "b": pair.a, "difference": -pair.difference, "low": -pair.high, "high": -pair.low}
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
