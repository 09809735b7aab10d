"""Weights in floats of 8 bits, and products of such floats where a GPU has a unit for them.

e4m3 has 4 bits of exponent and 3 of mantissa (Micikevicius et al. 2022, arXiv:2209.05433): a number is off by at most a
16th of itself. A matrix has one scale per output. Where products run in 8 bits, what enters them is rounded too, each
row with a scale that is taken anew. Everywhere else `unpack` makes a matrix that is multiplied as any other: that is
the slow twin. Knows no module.
Shapes: N rows, D and E input and output width of a map.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from tritune.models import regions

FORMAT = torch.float8_e4m3fn
LARGEST = torch.finfo(FORMAT).max
#: the largest number of a row is taken for no less, so that a row of zeros has a scale
SMALLEST = 1e-30
#: what the widths of a map must be multiples of, and the first generation of GPUs that has the unit
STEP, CAPABILITY = 16, (8, 9)


def pack(weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (E, D) and a scale (E) per output: its largest weight becomes the format's largest number.

    Codes are kept as bytes, since floats would be turned into others with all floats of a module (`nn.Module.to`), and row by
    row, which the unit wants and a transposed weight is not.
    """
    codes_ED, scales_E1 = rounded(weight_ED)
    return codes_ED.contiguous().view(torch.uint8), scales_E1.flatten()


def unpack(codes_ED: Tensor, scales_E: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (E, D)."""
    wide = torch.promote_types(dtype, torch.float32)
    return (codes_ED.view(FORMAT).to(wide) * scales_E[:, None]).to(dtype)


def runs_here(x: Tensor, codes_ED: Tensor) -> bool:
    """Whether a product with these inputs runs in 8 bits: in bf16, on a GPU that multiplies e4m3."""
    return (
        x.is_cuda
        and x.dtype is torch.bfloat16
        and not any(width % STEP for width in codes_ED.shape)
        and torch.cuda.get_device_capability(x.device) >= CAPABILITY
    )


def product(x: Tensor, codes_ED: Tensor, scales_E: Tensor) -> Tensor:
    """x Wᵀ (..., E), with x (..., D) rounded to 8 bits."""
    x_ND, scales_N1 = _rounded(x.flatten(0, -2))
    return _as_rows_of(x, _product(x_ND, scales_N1, codes_ED.view(FORMAT).T, scales_E[None]))


def slope(g: Tensor, codes_ED: Tensor, scales_E: Tensor) -> Tensor:
    """g W (..., D), with g (..., E) rounded to 8 bits. The scales lie along what is summed here, so g takes them first."""
    g_NE, scales_N1 = _rounded(g.flatten(0, -2), scales_E)
    turned_ED = codes_ED.T.contiguous().view(FORMAT).T  # the unit wants its second matrix column by column
    ones_1D = scales_E.new_ones(1, codes_ED.shape[1])
    return _as_rows_of(g, _product(g_NE, scales_N1, turned_ED, ones_1D))


def _as_rows_of(x: Tensor, y_NE: Tensor) -> Tensor:
    """Not as a view where it can be itself: others write into it."""
    return y_NE if x.dim() == 2 else y_NE.view(*x.shape[:-1], -1)


def rounded(x_ND: Tensor, by_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (N, D) of x, or of x times `by`, and a scale (N, 1) for each row."""
    wide = x_ND.float() if by_D is None else x_ND.float() * by_D
    scales_N1 = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (wide / scales_N1).to(FORMAT), scales_N1


def _rounded(x_ND: Tensor, by_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (regions.compiled(rounded) if regions.in_use(x_ND) else rounded)(x_ND, by_D)


def _product(a: Tensor, scales_N1: Tensor, b: Tensor, scales_1E: Tensor) -> Tensor:
    rows = ScalingType.RowWise
    found: Tensor = scaled_mm(a, b, scales_N1, rows, scales_1E, rows, output_dtype=torch.bfloat16, use_fast_accum=True)
    return found
