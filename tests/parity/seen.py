"""What the comparisons of the suite came to, noted as they are made: `run.py` tells the largest. Asserts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Seen:
    """`largest`: of all comparisons; `cells`: by method, format and family. `method`, `format`: what is being exchanged."""

    largest: float = 0.0
    cells: dict[tuple[str, str, str], float] = field(default_factory=dict)
    method: str | None = None
    format: str | None = None

    def note(self, got: Sequence[Tensor], wanted: Sequence[Tensor], family: str | None = None) -> None:
        """The largest difference of these logits, as a share of the largest logit wanted."""
        size = max(float(t.detach().abs().max()) for t in wanted)
        gap = max(float((a - b).detach().abs().max()) for a, b in zip(got, wanted, strict=True)) / size
        self.largest = max(self.largest, gap)
        if family and self.method and self.format:
            cell = (self.method, self.format, family)
            self.cells[cell] = max(self.cells.get(cell, 0.0), gap)


SEEN = Seen()
