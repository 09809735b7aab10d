"""What surrounds the matrix products of a layer, with forward and backward written out: norms, rotary positions, gated
activations, and linear maps with low-rank terms. Each saves only what its backward needs and passes over memory as few
times as plain torch allows; each has a slow twin in transformers (or in `reference_linear`) that tests hold it against.

Knows tensors, no module and no method. `fast.py` says where these stand in for a model's own code.
Shapes: N packed tokens, D and E input and output width, H heads, d head width, F width of a gated layer, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, starmap
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tritune.models import regions
from tritune.models.base import LowRank
from tritune.models.dtype import at_least_float32


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    normed: Tensor = _RmsNorm.apply(x, weight_D, eps)  # type: ignore[no-untyped-call]
    return normed


def rms_normed(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same, with no backward."""
    if regions.in_use(x):
        return regions.compiled(regions.normed)(x, weight_D, eps)
    return _scaled(x, weight_D, eps)[0]


def _inverse(wide: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps)."""
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


def _scaled(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x, and what it was multiplied by."""
    wide = at_least_float32(x)
    inverse = _inverse(wide, eps)
    return (wide * inverse if wide is x else wide.mul_(inverse)).to(x.dtype).mul_(weight_D), inverse


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        if regions.in_use(x):
            ctx.save_for_backward(x, weight_D)
            return rms_normed(x, weight_D, eps)
        normed, inverse = _scaled(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, *kept = ctx.saved_tensors
        wants_x, wants_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        inverse = kept[0] if kept else _inverse(at_least_float32(x), ctx.eps) if wants_weight else None
        if wants_weight:
            every = tuple(range(x.dim() - 1))
            grad_weight = (g * (x * inverse)).sum(every).to(weight_D.dtype)
        if wants_x and regions.in_use(x):
            grad_x = regions.compiled(regions.norm_slope)(g, x, weight_D, ctx.eps)
        elif wants_x:
            inverse = _inverse(x, ctx.eps) if inverse is None else inverse
            wide, wide_x = (
                (g * weight_D).to(inverse.dtype),
                x.to(inverse.dtype),
            )  # mixed formats take a slow way in addcmul
            mean = torch.linalg.vecdot(wide, wide_x)[..., None].mul_(inverse.pow(3)).div_(x.shape[-1])
            grad_x = wide.mul_(inverse).addcmul_(wide_x, mean, value=-1).to(x.dtype)
        return grad_x, grad_weight, None


def rotate(x_NHd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864, eq. 34), halves rotated against each other. Returns (H, N, d)."""
    rotated: Tensor = _Rotate.apply(x_NHd, cos_Nd, sin_Nd)  # type: ignore[no-untyped-call]
    return rotated


class _Rotate(torch.autograd.Function):
    """A rotation: its backward is the rotation the other way round."""

    @staticmethod
    def forward(ctx: Any, x_NHd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
        ctx.save_for_backward(cos_Nd, sin_Nd)
        x_HNd = x_NHd.transpose(0, 1)
        return _rotate_into(x_HNd.new_empty(x_HNd.shape), x_HNd, cos_Nd, sin_Nd, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_HNd: Tensor) -> tuple[Tensor, None, None]:
        cos_Nd, sin_Nd = ctx.saved_tensors
        g_NHd = g_HNd.transpose(0, 1)
        return _rotate_into(g_NHd.new_empty(g_NHd.shape), g_NHd, cos_Nd[:, None], sin_Nd[:, None], -1), None, None


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """out = x turned forwards (sign 1) or back (-1), where going back exchanges the sines of the two halves."""
    half = x.shape[-1] // 2
    first, second = (sin[..., :half], sin[..., half:]) if sign > 0 else (sin[..., half:], sin[..., :half])
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], first, value=-sign)
    out[..., half:].addcmul_(x[..., :half], second, value=sign)
    return out


def rotated_heads(y_NE: Tensor, cos_Nd: Tensor, sin_Nd: Tensor, key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (H, N, d) and keys (K, N, d), rotated, and values (K, N, d), from one tensor that holds them side by side."""
    q, k, v = _RotatedHeads.apply(y_NE, cos_Nd, sin_Nd, key_heads)  # type: ignore[no-untyped-call]
    return q, k, v


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_NE: Tensor, cos_Nd: Tensor, sin_Nd: Tensor, key_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_Nd, sin_Nd)
        ctx.key_heads = key_heads
        (N, d), K = cos_Nd.shape, key_heads
        y_NHd = y_NE.view(N, -1, d)
        H = y_NHd.shape[1] - 2 * K
        turned = _rotate_into(y_NE.new_empty(H + K, N, d), y_NHd[:, : H + K].transpose(0, 1), cos_Nd, sin_Nd, 1)
        return turned[:H], turned[H:], y_NHd[:, H + K :].transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gq_HNd: Tensor, gk_KNd: Tensor, gv_KNd: Tensor) -> tuple[Tensor, None, None, None]:
        (cos_Nd, sin_Nd), K = ctx.saved_tensors, ctx.key_heads
        H, N, d = gq_HNd.shape
        grad_NHd = gq_HNd.new_empty(N, H + 2 * K, d)
        cos, sin = cos_Nd[:, None], sin_Nd[:, None]
        _rotate_into(grad_NHd[:, :H], gq_HNd.transpose(0, 1), cos, sin, -1)
        _rotate_into(grad_NHd[:, H : H + K], gk_KNd.transpose(0, 1), cos, sin, -1)
        grad_NHd[:, H + K :] = gv_KNd.transpose(0, 1)
        return grad_NHd.view(N, -1), None, None, None


def swiglu(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) * up, both in one tensor, gate first (Shazeer 2020, arXiv:2002.05202). Returns (N, F)."""
    product: Tensor = _SwiGLU.apply(gate_up_N2F)  # type: ignore[no-untyped-call]
    return product


def gated(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """The same of two tensors."""
    product: Tensor = _Gated.apply(gate_NF, up_NF)  # type: ignore[no-untyped-call]
    return product


def swiglu_of(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """The same, with no backward."""
    if regions.in_use(gate_NF):
        return regions.compiled(regions.swiglu)(gate_NF, up_NF)
    return F.silu(gate_NF).mul_(up_NF)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_N2F)
        return swiglu_of(*gate_up_N2F.chunk(2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NF: Tensor) -> Tensor:
        (gate_up_N2F,) = ctx.saved_tensors
        grad_N2F = torch.empty_like(gate_up_N2F)
        _swiglu_slopes(g_NF, *gate_up_N2F.chunk(2, -1), *grad_N2F.chunk(2, -1))
        return grad_N2F


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return swiglu_of(gate_NF, up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        grad_gate_NF, grad_up_NF = torch.empty_like(gate_NF), torch.empty_like(up_NF)
        _swiglu_slopes(g_NF, gate_NF, up_NF, grad_gate_NF, grad_up_NF)
        return grad_gate_NF, grad_up_NF


def _swiglu_slopes(g_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, grad_gate_NF: Tensor, grad_up_NF: Tensor) -> None:
    """Into the last two."""
    if regions.in_use(g_NF) and not g_NF.is_cuda:
        regions.compiled(regions.write_slopes)(grad_gate_NF, grad_up_NF, g_NF, gate_NF, up_NF)
        return
    if regions.in_use(g_NF):
        regions.compiled(regions.write_gate_slope)(grad_gate_NF, g_NF, gate_NF, up_NF)
        regions.compiled(regions.write_up_slope)(grad_up_NF, g_NF, gate_NF)
        return
    torch.mul(g_NF, up_NF, out=grad_up_NF)
    torch.ops.aten.silu_backward.grad_input(grad_up_NF, gate_NF, grad_input=grad_gate_NF)
    torch.mul(F.silu(gate_NF), g_NF, out=grad_up_NF)


@dataclass(frozen=True, slots=True)
class Part:
    """Low-rank terms of some of the tokens: one for each of several maps, or none. `runs` are disjoint."""

    runs: tuple[slice, ...]
    terms: tuple[LowRank | None, ...]


class Matrix(Protocol):
    """A frozen matrix W (E, D) that is no tensor of numbers."""

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ (..., E), a tensor of its own."""

    def slope(self, g: Tensor) -> Tensor:
        """g W (..., D), a tensor of its own."""


def linear(
    x_ND: Tensor, weight_ED: Tensor | Matrix, bias_E: Tensor | None, widths: Sequence[int], parts: Sequence[Part]
) -> Tensor:
    """Several frozen linear maps of one input as one product, with low-rank terms for all tokens or for some.

    Args:
        weight_ED: their weights, one above the other; no gradient reaches them.
        widths: output width of each; together E.
        parts: what is added: y_i += scale_i * (x A_iᵀ) B_iᵀ at the tokens of the part, for map i.

    Returns:
        (N, E): the outputs side by side.
    """
    columns = _side_by_side(widths)
    placed, learned = [], []
    for part in parts:
        given = [(place, term) for place, term in zip(columns, part.terms, strict=True) if term is not None]
        if given:
            placed.append(_Placed(part.runs, tuple((place, term.scale) for place, term in given)))
            learned += [term.A_rD for _, term in given] + [term.B_Er for _, term in given]
    if not placed and isinstance(weight_ED, Tensor):
        return F.linear(x_ND, weight_ED, bias_E)
    y_NE: Tensor = _LowRankLinear.apply(x_ND, weight_ED, bias_E, tuple(placed), *learned)  # type: ignore[no-untyped-call]
    return y_NE


def times(x_ND: Tensor, in_D: Tensor, again: partial[Tensor] | None = None) -> Tensor:
    """x times a factor for each column. `again`: makes x once more, of tensors, which are kept instead of x."""
    sources, make = ((x_ND,), None) if again is None else (again.args, again.func)
    scaled_ND: Tensor = _Times.apply(x_ND, in_D, make, *sources)  # type: ignore[no-untyped-call]
    return scaled_ND


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, in_D: Tensor, make: Callable[..., Tensor] | None, *sources: Tensor) -> Tensor:
        used_D = in_D.to(x_ND.dtype)
        ctx.save_for_backward(used_D, *sources)
        ctx.make, ctx.stored_as = make, in_D.dtype
        return x_ND * used_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor | None, ...]:
        used_D, *sources = ctx.saved_tensors
        x_ND = sources[0] if ctx.make is None else ctx.make(*sources)
        grad_D = (g_ND * x_ND).sum(0).to(ctx.stored_as)
        grad_ND = g_ND * used_D if ctx.needs_input_grad[0] else None
        return grad_ND, grad_D, None, *(None for _ in sources)


def scaled(y_NE: Tensor, widths: Sequence[int], factors: Sequence[Tensor | None]) -> Tensor:
    """A product that is nobody else's, outputs of several maps side by side, times the factors of some of these, in place."""
    places = [i for i, factor in enumerate(factors) if factor is not None]
    if not places:
        return y_NE
    first, last = places[0], places[-1] + 1
    used = [
        torch.ones(width, device=y_NE.device) if factor is None else factor
        for width, factor in zip(widths[first:last], factors[first:last], strict=True)
    ]
    columns = _side_by_side(widths)
    scaled_NE: Tensor = _Scaled.apply(  # type: ignore[no-untyped-call]
        y_NE, slice(columns[first].start, columns[last - 1].stop), used[0] if len(used) == 1 else torch.cat(used)
    )
    return scaled_NE


class _Scaled(torch.autograd.Function):
    """Of the columns, what they were is kept; all others pass."""

    @staticmethod
    def forward(ctx: Any, y_NE: Tensor, columns: slice, out_e: Tensor) -> Tensor:
        y_Ne, used_e = y_NE[:, columns], out_e.to(y_NE.dtype)
        ctx.save_for_backward(y_Ne.clone(), used_e)
        ctx.columns, ctx.stored_as = columns, out_e.dtype
        ctx.mark_dirty(y_NE)
        y_Ne.mul_(used_e)
        return y_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor | None, None, Tensor]:
        before_Ne, used_e = ctx.saved_tensors
        grad_e = (g_NE[:, ctx.columns] * before_Ne).sum(0).to(ctx.stored_as)
        if not ctx.needs_input_grad[0]:
            return None, None, grad_e
        grad_NE = g_NE.clone()
        grad_NE[:, ctx.columns].mul_(used_e)
        return grad_NE, None, grad_e


@dataclass(frozen=True, slots=True)
class _Placed:
    """Where terms act: their tokens, and each one's columns and scale."""

    runs: tuple[slice, ...]
    terms: tuple[tuple[slice, float], ...]


class _LowRankLinear(torch.autograd.Function):
    """Saves x, its low-rank images, and A and B in the width of x, in which they are computed with.

    B's gradient is taken as (hᵀ g)ᵀ: several times faster than gᵀ h at small ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_ED: Tensor | Matrix,
        bias_E: Tensor | None,
        placed: tuple[_Placed, ...],
        *learned: Tensor,
    ) -> Tensor:
        numbers = weight_ED if isinstance(weight_ED, Tensor) else None
        y_NE = _frozen(x_ND, weight_ED, bias_E)
        images, used = [], []
        for part, A_RD, ranks, Bs in _terms(placed, learned, x_ND.dtype):
            used += [A_RD, *Bs]
            for run in part.runs:
                h_nR = x_ND[run] @ A_RD.T
                for (columns, scale), rank, B_Er in zip(part.terms, ranks, Bs, strict=True):
                    y_NE[run, columns].addmm_(h_nR[:, rank], B_Er.T, alpha=scale)
                images.append(h_nR)
        ctx.save_for_backward(x_ND if placed else None, numbers, *used, *images)
        ctx.matrix = None if numbers is not None else weight_ED
        ctx.placed, ctx.n_used = placed, len(used)
        ctx.stored_as = [tensor.dtype for tensor in learned]
        return y_NE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, numbers_ED, *saved = ctx.saved_tensors
        used, images = iter(saved[: ctx.n_used]), iter(saved[ctx.n_used :])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = g_NE @ numbers_ED if ctx.matrix is None else ctx.matrix.slope(g_NE)
        slopes: list[Tensor] = []
        for part in ctx.placed:
            A_RD, Bs = next(used), [next(used) for _ in part.terms]
            ranks = _side_by_side([B.shape[1] for B in Bs])
            of_runs = [
                _slopes(part.terms, ranks, Bs, A_RD, x_ND[run], next(images), g_NE[run], _rows(grad_x, run))
                for run in part.runs
            ]
            slopes += [sum(of_term[1:], of_term[0]) for of_term in zip(*of_runs, strict=True)]
        wide = [slope.to(dtype) for slope, dtype in zip(slopes, ctx.stored_as, strict=True)]
        return grad_x, None, None, None, *wide


def _frozen(x_ND: Tensor, weight_ED: Tensor | Matrix, bias_E: Tensor | None) -> Tensor:
    if isinstance(weight_ED, Tensor):
        return F.linear(x_ND, weight_ED, bias_E)
    y_NE = weight_ED.product(x_ND)
    return y_NE if bias_E is None else y_NE.add_(bias_E)


def _terms(
    placed: Sequence[_Placed], learned: Sequence[Tensor], dtype: torch.dtype
) -> Iterator[tuple[_Placed, Tensor, list[slice], list[Tensor]]]:
    """Each part with its A (one above the other, and which rows are whose) and its B."""
    at = 0
    for part in placed:
        n = len(part.terms)
        As, Bs = learned[at : at + n], learned[at + n : at + 2 * n]
        at += 2 * n
        ranks = _side_by_side(map(len, As))
        yield part, (As[0] if n == 1 else torch.cat(list(As))).to(dtype), ranks, [B.to(dtype) for B in Bs]


def _side_by_side(widths: Iterable[int]) -> list[slice]:
    return list(starmap(slice, pairwise(accumulate(widths, initial=0))))


def _rows(x: Tensor | None, run: slice) -> Tensor | None:
    return None if x is None else x[run]


def _slopes(
    terms: Sequence[tuple[slice, float]],
    ranks: Sequence[slice],
    Bs: Sequence[Tensor],
    A_RD: Tensor,
    x_nD: Tensor,
    h_nR: Tensor,
    g_nE: Tensor,
    grad_x: Tensor | None,
) -> list[Tensor]:
    """Gradients of every A, then of every B, from one run of tokens; what the terms pass on is added to `grad_x`."""
    back_nR = torch.empty_like(h_nR)
    of_B = []
    for (columns, scale), rank, B_Er in zip(terms, ranks, Bs, strict=True):
        torch.mul(g_nE[:, columns] @ B_Er, scale, out=back_nR[:, rank])
        of_B.append((h_nR[:, rank].T @ g_nE[:, columns]).mul_(scale).T)
    if grad_x is not None:
        grad_x.addmm_(back_nR, A_RD)
    of_A = back_nR.T @ x_nD
    return [*(of_A[rank] for rank in ranks), *of_B]


def reference_linear(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, widths: Sequence[int], parts: Sequence[Part]
) -> Tensor:
    """The same by autograd, map by map: the oracle of the tests."""
    biases = [None] * len(widths) if bias_E is None else torch.split(bias_E, list(widths))
    outputs = []
    for i, (weight, bias) in enumerate(zip(torch.split(weight_ED, list(widths)), biases, strict=True)):
        y = F.linear(x_ND, weight, bias)
        for part in parts:
            term = part.terms[i]
            if term is not None:
                added = term.scale * F.linear(F.linear(x_ND, term.A_rD.to(x_ND.dtype)), term.B_Er.to(x_ND.dtype))
                mine_N1 = torch.zeros_like(x_ND[:, :1])
                for run in part.runs:
                    mine_N1[run] = 1
                y = y + mine_N1 * added
        outputs.append(y)
    return torch.cat(outputs, -1)
