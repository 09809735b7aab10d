"""Every method x every variant x a few tiny bases: the laws are written once and a new method joins by its table line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tritune.methods import method, table
from tritune.methods.base import Delta, Method
from tritune.models.base import Batch, Span
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.spec import MethodConfig
from tritune.text.encode import Encoded

#: plain and tied; fused and transposed weights, learned positions; windows, soft caps and extra norms
BASES = ("llama-tied", "gpt2", "gemma2")


@cache
def shared_base(name: str) -> Base:
    """Tests never change a base; that is one of the laws."""
    return tiny_base(name)


@dataclass(frozen=True)
class Case:
    """One method with one config on one base."""

    method: Method[Any]
    config: MethodConfig
    base: Base

    def fresh(self, seed: int = 0) -> Delta:
        return self.method.init(self.config, self.base, torch.Generator().manual_seed(seed))

    def moved(self, seed: int = 0, size: float = 0.1) -> Delta:
        """A delta as after some training: every tensor away from its start."""
        delta = self.fresh(seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in delta.trainable().values():
                parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return delta.eval()


def kinds_and_variants() -> list[tuple[str, int]]:
    return [(kind, i) for kind in table() for i in range(len(method(kind).variants))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cells = [(kind, i, base) for kind, i in kinds_and_variants() for base in BASES]
        metafunc.parametrize("case", cells, indirect=True, ids=[f"{kind}{i}-{base}" for kind, i, base in cells])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    kind, i, base = request.param
    return Case(method(kind), method(kind).variants[i], shared_base(base))


def ids_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random rows of token ids, special ids left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]


def batch_of(rows: Sequence[Sequence[int]], slots: tuple[int, ...] | None = None) -> Batch:
    starts = [sum(map(len, rows[:i])) for i in range(len(rows))]
    # a row's text ends with the row: where virtual tokens stand behind it, its last position is the last of these
    spans = tuple(Span(start, len(row), text=len(row)) for start, row in zip(starts, rows, strict=True))
    return Batch(torch.tensor([i for row in rows for i in row]), spans, None, slots)


def outputs(
    base: Base, edits: Any, rows: Sequence[Sequence[int]], slots: tuple[int, ...] | None = None
) -> list[Tensor]:
    """Logits of every position, row by row."""
    with torch.no_grad(), base.bind(edits):
        logits = base.logits(batch_of(rows, slots), torch.arange(sum(map(len, rows))))
    return list(logits.split([len(row) for row in rows]))


def training_rows(n: int = 12, seed: int = 3) -> list[Encoded]:
    """Rows with answers of one and of several tokens."""
    rows = ids_of([5 + (7 * i) % 9 for i in range(n)], seed)
    choices = ((7,), (8, 9), (11, 12, 13))
    return [Encoded(str(i), tuple(row), choices[i % 3], choices, i % 3) for i, row in enumerate(rows)]
