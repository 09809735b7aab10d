"""What is needed to go on training exactly where it stopped: tensors and a few facts. Never confused with an adaptation.

Written as safetensors + JSON; nothing here is ever pickled. Knows no method: a delta's state is a mapping of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tritune.evaluate.record import CurvePoint
from tritune.spec import Frozen


class Best(Frozen):
    """The best evaluation so far."""

    step: int
    score: float
    loss: float


class Facts(Frozen):
    """Where a run stands. `curve` holds the evaluations and losses so far."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: Best | None = None
    stale: int = 0
    curve: tuple[CurvePoint, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainState:
    """`tensors` by group: "delta/...", "optimizer/...", "best/...", "rng". Those of a run in progress are its own."""

    facts: Facts
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}/"): t for key, t in self.tensors.items() if key.startswith(f"{name}/")}

    def given_up(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """Those of a group; each leaves the state in its turn, and is gone once copied, unless others share its memory."""
        for key in [key for key in self.tensors if key.startswith(f"{name}/")]:
            yield key.removeprefix(f"{name}/"), self.tensors.pop(key)

    def kept(self) -> TrainState:
        """A copy that stays as it is while training goes on."""
        return TrainState(self.facts, copied(self.tensors))


def grouped(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": tensor.detach() for key, tensor in tensors.items()}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
