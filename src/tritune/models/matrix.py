"""The frozen matrix behind a site, as methods see it that need it beside what comes out of it.

Reads the base's own module, and keeps no copy of what it holds. Knows no method. Shapes: D and E input and output width of
the site.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tritune.models.quantised import QuantisedLinear
from tritune.models.sites import Rows

#: columns whose squares are in fp64 at one time
_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class SiteMatrix:
    """`module` may hold more than the site's part, which `rows` tells. A quantised one is dequantised to `dtype` at each
    look."""

    module: nn.Module
    dtype: torch.dtype
    bias: Tensor | None
    rows: Rows

    @property
    def weight(self) -> Tensor:
        """All of the module's, as the family keeps it."""
        if isinstance(self.module, QuantisedLinear):
            return self.module.stored(self.dtype)
        return self.module.get_parameter("weight").detach()

    def own_ED(self) -> Tensor:
        return self.rows.of(self.weight)

    def bias_E(self) -> Tensor | None:
        return None if self.bias is None else self.rows.of_outputs(self.bias.detach())

    @cached_property
    def squared_norms_E(self) -> Tensor:
        """Of each output's row, at least fp32. Computed once: the matrix is frozen."""
        return squared_norms(self.own_ED()).to(torch.promote_types(self.dtype, torch.float32))


def squared_norms(rows_ED: Tensor) -> Tensor:
    """Of each row (E,), summed in fp64: over the 49,152 columns of an embedding fp32 loses two of its digits."""
    blocks = torch.split(rows_ED, _BLOCK, dim=1)
    return torch.stack([block.double().square().sum(dim=1) for block in blocks]).sum(dim=0)
