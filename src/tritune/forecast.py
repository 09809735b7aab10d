"""How long a comparison will take on this machine, and how many rows fit into a given time. Arithmetic, nothing else.

Everything is counted in forward passes of one row, which is all that is known of the machine (`pace.py` measures it).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tritune.spec import Scope

#: what a training row costs in forward passes: forward, gradient of the inputs, and of the weights where these train
PASSES = {Scope.ROW: 2.0, Scope.BASE: 3.0}


@dataclass(frozen=True, slots=True)
class Work:
    """What a comparison does, apart from its methods.

    Attributes:
        train, dev, test: rows of each split.
        rates: learning rates that are tried, each for `share` of the steps; the best one goes on from there.
        few_shot: whether there is a second pass of prompting.
    """

    train: int
    dev: int
    test: int
    epochs: float
    evaluations: int
    seeds: int
    rates: int
    share: float
    few_shot: bool

    def seconds(self, per_row: float, scopes: Iterable[Scope]) -> float:
        """What is ahead after zero-shot prompting, for methods of these scopes, where a row takes `per_row` seconds."""
        rows = float(self.test * self.few_shot)
        for scope in scopes:
            trained = self.train * self.epochs * PASSES[scope]
            rows += self.seeds * (trained + self.dev * self.evaluations + self.test)
            if self.rates > 1:
                rows += (self.rates - 1) * self.share * trained + self.rates * self.dev
        return rows * per_row

    def share_within(self, seconds: float, per_row: float, scopes: Iterable[Scope]) -> float:
        """Which share of the training and test rows fits into `seconds`, zero-shot prompting included; at most 1."""
        methods = tuple(scopes)
        constant = replace(self, train=0, test=0).seconds(per_row, methods)
        whole = self.seconds(per_row, methods) + self.test * per_row
        return min(1.0, max(0.0, seconds - constant) / (whole - constant))
