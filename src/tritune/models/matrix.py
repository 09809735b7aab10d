"""The frozen matrix behind a site, as methods see it that need it beside what comes out of it.

Reads the base's own parameter, never a copy. Knows no method. Shapes: D and E input and output width of the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tritune.models.sites import Rows


@dataclass(frozen=True, eq=False)
class SiteMatrix:
    """`weight` and `bias` are the module's whole parameters; `rows` says which part of them is the site's."""

    weight: Tensor
    bias: Tensor | None
    rows: Rows

    def own_ED(self) -> Tensor:
        return self.rows.of(self.weight.detach())

    def bias_E(self) -> Tensor | None:
        return None if self.bias is None else self.rows.of_outputs(self.bias.detach())

    @cached_property
    def squared_norms_E(self) -> Tensor:
        """Of each output's row, at least fp32. Computed once: the matrix is frozen."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        norms_E: Tensor = torch.linalg.vector_norm(self.own_ED(), dim=1, dtype=wide)
        return norms_E.square()
