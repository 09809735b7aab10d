"""What the comparisons of the suite came to, noted as they are made: `run.py` tells the largest. Asserts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # pytest wants to be there before what that brings along
    from tritune.models.pretrained import Base

#: what the page calls OPT where it norms after the sum
POST_NORM = "opt-post-norm"


@dataclass(frozen=True, order=True)
class Variant:
    """One way to use a method, and the package that computes the same."""

    method: str
    name: str
    reference: str


@dataclass
class Gaps:
    """Largest differences of one variant on some bases, as a share of the largest number wanted. None: not compared."""

    bases: set[str] = field(default_factory=set)
    logits: float = 0.0
    gradients: float | None = None


@dataclass
class Seen:
    """`largest`: of all comparisons.

    `cells`: of the logits of what was exchanged, by method, format and family; `method`, `format` say what that is.
    `variants`: of logits and gradients beside a reference implementation, by variant and whether the base is a tiny one;
    `variant`, `base` say what is being compared.
    """

    largest: float = 0.0
    cells: dict[tuple[str, str, str], float] = field(default_factory=dict)
    method: str | None = None
    format: str | None = None
    variants: dict[tuple[Variant, bool], Gaps] = field(default_factory=dict)
    variant: Variant | None = None
    base: Base | None = None

    def comparing(self, method: str, name: str, base: Base, reference: str = "PEFT") -> None:
        """From here on: this variant on this base."""
        self.variant, self.base = Variant(method, name, reference), base

    def note(self, got: Sequence[Tensor], wanted: Sequence[Tensor], family: str | None = None) -> float:
        """The largest difference of these logits, as a share of the largest logit wanted; also returned."""
        size = max(float(t.detach().abs().max()) for t in wanted)
        gap = max(float((a - b).detach().abs().max()) for a, b in zip(got, wanted, strict=True)) / size
        self.largest = max(self.largest, gap)
        if family and self.method and self.format:
            cell = (self.method, self.format, family)
            self.cells[cell] = max(self.cells.get(cell, 0.0), gap)
        return gap

    def note_variant(self, *, logits: float = 0.0, gradients: float | None = None) -> None:
        """What the variant that is being compared came to."""
        if self.variant is None or self.base is None:
            return
        gaps = self.variants.setdefault((self.variant, is_tiny(self.base)), Gaps())
        gaps.bases.add(family_of(self.base))
        gaps.logits = max(gaps.logits, logits)
        if gradients is not None:
            gaps.gradients = max(gaps.gradients or 0.0, gradients)


def is_tiny(base: Base) -> bool:
    """Whether its weights are random; else it is the packaged one."""
    return base.located is None or base.located.kind != "packaged"


def family_of(base: Base) -> str:
    """What the page calls a base: a tiny one by its family (that which norms after the sum apart), the real one by name."""
    if not is_tiny(base):
        return base.name
    return POST_NORM if getattr(base.config, "do_layer_norm_before", True) is False else str(base.config.model_type)


def as_vectors(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one number, learned scalings, together: a sum that nearly cancels is no measure of itself."""
    alone = {name: gradient.flatten() for name, gradient in gradients.items() if gradient.numel() == 1}
    whole = {name: gradient for name, gradient in gradients.items() if name not in alone}
    return whole | ({"scalings": torch.cat([alone[name] for name in sorted(alone)])} if alone else {})


SEEN = Seen()
