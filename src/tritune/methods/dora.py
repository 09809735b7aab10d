"""DoRA's part of a LoRA: each row of W + s B A is brought to a learned length m (Liu et al. 2024, arXiv:2402.09353).

    y = m / c * (W x + s B A x) + b,   c = the norms of the rows of W + s B A

In the gradient c is a constant (section 4.3 there). The norms come from

    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A') b'

row by row, so B A (E, D) is never made; `reference_norms` makes it and is the oracle of the tests. Where a row of W + s B A
is many times shorter than its row of W, the sum cancels and c loses digits.
Shapes: r rank, D and E input and output width of a site, N packed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tritune.models.dtype import at_least_float32
from tritune.models.matrix import SiteMatrix


@torch.no_grad()
def norms(matrix: SiteMatrix, A_rD: Tensor, B_Er: Tensor, scale: float) -> Tensor:
    """c (E,), at least fp32. Over a bf16 base the product with W is in bf16, as in the forward pass."""
    own_ED = matrix.own_ED()
    crossed_Er = own_ED @ A_rD.T.to(own_ED.dtype)
    squared_Er = scale * (B_Er @ (A_rD @ A_rD.T)) + 2 * crossed_Er
    squared_E = matrix.squared_norms_E + scale * (squared_Er * B_Er).sum(1)
    # A row of nothing but zeros (an unused token of the head) has the length m = 0, and stays at 0 / c.
    return squared_E.clamp_min(torch.finfo(squared_E.dtype).tiny).sqrt()


@torch.no_grad()
def reference_norms(matrix: SiteMatrix, A_rD: Tensor, B_Er: Tensor, scale: float) -> Tensor:
    """The same from the matrix itself; exact where `norms` cancels."""
    norms_E: Tensor = torch.linalg.vector_norm(at_least_float32(matrix.own_ED()) + scale * (B_Er @ A_rD), dim=1)
    return norms_E


def lengthened(matrix: SiteMatrix, sum_NE: Tensor, factor_E: Tensor) -> Tensor:
    """What comes out (N, E) once everything but the bias is multiplied by m / c.

    Args:
        sum_NE: W x + b + s B A x.
    """
    y_NE = sum_NE * factor_E  # in fp32: rounded to bf16, a factor this close to one would not move
    bias_E = matrix.bias_E()
    return (y_NE if bias_E is None else y_NE + (1 - factor_E) * bias_E).to(sum_NE.dtype)
