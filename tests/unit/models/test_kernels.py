"""Hand-written forwards and backwards against autograd on the plain formula, in double precision."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tritune.models import kernels
from tritune.models.base import LowRank


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(True)


def same(fast: Callable[[], Tensor], slow: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Values and gradients agree."""
    got, want = fast(), slow()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = random(*want.shape, seed=99).detach()
    slopes = torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((want * weight).sum(), inputs)
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 6), (1, 7, 6), (5, 3, 6)], ids=str)
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = random(*shape), random(6, seed=1)
    same(
        lambda: kernels.rms_norm(x, weight, 1e-3),
        lambda: weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)),
        (x, weight),
    )


def turned(x_NHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_NHd.chunk(2, -1)
    rotated: Tensor = x_NHd * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return rotated.transpose(0, 1)


def angles(n: int, d: int) -> tuple[Tensor, Tensor]:
    """Different angles for the two halves: a backward that mixes them up must show."""
    angle = random(n, d, seed=5).detach()
    return angle.cos(), angle.sin()


def test_rotary_positions() -> None:
    x, (cos, sin) = random(7, 3, 8), angles(7, 8)
    same(lambda: kernels.rotate(x, cos, sin), lambda: turned(x, cos, sin), (x,))


def test_heads_side_by_side_are_told_apart() -> None:
    N, H, K, d = 7, 4, 2, 6
    y, (cos, sin) = random(N, (H + 2 * K) * d), angles(7, 6)

    def slow() -> Tensor:
        q, k, v = y.view(N, -1, d).split([H, K, K], 1)
        return torch.cat([turned(q, cos, sin), turned(k, cos, sin), v.transpose(0, 1)])

    same(lambda: torch.cat(kernels.rotated_heads(y, cos, sin, K)), slow, (y,))


def test_swiglu() -> None:
    x = random(7, 10)
    same(lambda: kernels.swiglu(x), lambda: F.silu(x[:, :5]) * x[:, 5:], (x,))


def parts_of(which: tuple[int, ...], *places: tuple[slice, ...]) -> list[kernels.Part]:
    """Terms of the maps `which` for the tokens at each place, of ranks of their own."""
    widths, ranks, scales = [5, 3, 4], [2, 1, 3], [0.5, 2.0, -1.0]
    found = []
    for p, runs in enumerate(places):
        terms = [
            LowRank(random(r + p, 6, seed=10 + i + 100 * p), random(e, r + p, seed=20 + i + 100 * p), s)
            if i in which
            else None
            for i, (e, r, s) in enumerate(zip(widths, ranks, scales, strict=True))
        ]
        found.append(kernels.Part(runs, tuple(terms)))
    return found


def learned(parts: list[kernels.Part]) -> tuple[Tensor, ...]:
    return tuple(t for part in parts for term in part.terms if term for t in (term.A_rD, term.B_Er))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("which", [(0, 1, 2), (1,), (0, 2), ()], ids=str)
def test_linear_maps_with_low_rank_terms(which: tuple[int, ...], bias: bool) -> None:
    widths = [5, 3, 4]
    x, weight = random(7, 6), random(12, 6, seed=1).detach()
    given = random(12, seed=2).detach() if bias else None
    parts = parts_of(which, (slice(None),))
    same(
        lambda: kernels.linear(x, weight, given, widths, parts),
        lambda: kernels.reference_linear(x, weight, given, widths, parts),
        (x, *learned(parts)),
    )


@dataclass
class Given:
    """A matrix that is no tensor: what a quantised base gives."""

    weight_ED: Tensor

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ED)

    def slope(self, g: Tensor) -> Tensor:
        return g @ self.weight_ED


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("which", [(0, 2), ()], ids=str)
def test_a_matrix_that_is_no_tensor(which: tuple[int, ...], bias: bool) -> None:
    widths = [5, 3, 4]
    x, weight = random(7, 6), random(12, 6, seed=1).detach()
    given = random(12, seed=2).detach() if bias else None
    parts = parts_of(which, (slice(1, 6),))
    same(
        lambda: kernels.linear(x, Given(weight), given, widths, parts),
        lambda: kernels.reference_linear(x, weight, given, widths, parts),
        (x, *learned(parts)),
    )


@pytest.mark.parametrize("which", [(0, 1, 2), (1,), (0, 2)], ids=str)
def test_terms_act_on_their_own_tokens_only(which: tuple[int, ...]) -> None:
    """Several adaptations in one batch, one of them in two places; the last two tokens are nobody's."""
    x, weight, widths = random(11, 6), random(12, 6, seed=1).detach(), [5, 3, 4]
    mixed = parts_of(which, (slice(0, 2), slice(5, 9)), (slice(2, 5),))
    mixed.append(kernels.Part((slice(9, 10),), (None, None, None)))
    same(
        lambda: kernels.linear(x, weight, None, widths, mixed),
        lambda: kernels.reference_linear(x, weight, None, widths, mixed),
        (x, *learned(mixed)),
    )
    torch.testing.assert_close(kernels.linear(x, weight, None, widths, mixed)[9:], F.linear(x[9:], weight))


def test_no_gradient_is_computed_for_an_input_that_wants_none() -> None:
    """Below the lowest trained map there is no backward."""
    x, weight = random(7, 6).detach(), random(5, 6, seed=1).detach()
    term = LowRank(random(2, 6, seed=2), random(5, 2, seed=3), 1.0)
    kernels.linear(x, weight, None, [5], [kernels.Part((slice(None),), (term,))]).sum().backward()
    assert x.grad is None
    assert term.A_rD.grad is not None


@pytest.mark.parametrize("remade", [False, True])
def test_columns_times_a_factor(remade: bool) -> None:
    x, factor = random(7, 5), random(5, seed=1)
    again = partial(torch.clone, x.detach()) if remade else None
    same(lambda: kernels.times(x, factor, again), lambda: x * factor, (x, factor))


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2), (0, 2), (0, 1, 2)], ids=str)
def test_outputs_of_some_maps_are_scaled(which: tuple[int, ...]) -> None:
    widths = (4, 3, 2)
    x, weight = random(7, 5), random(9, 5, seed=1).detach()
    given = {i: random(widths[i], seed=2 + i) for i in which}
    whole = [given.get(i, torch.ones(width, dtype=torch.float64)) for i, width in enumerate(widths)]
    same(
        lambda: kernels.scaled(x @ weight.T, widths, [given.get(i) for i in range(3)]),
        lambda: (x @ weight.T) * torch.cat(whole),
        (x, *given.values()),
    )


def test_what_a_factors_slope_needs_is_let_go_in_the_backward() -> None:
    """The sources of what is made again, although the loss, and its graph with it, is still held."""
    x, factor = random(7, 5), random(5, seed=1)
    source = x.detach() / 2
    loss = kernels.times(x, factor, partial(torch.add, source, source)).sum()
    held = weakref.ref(source)
    del source
    assert held() is not None
    loss.backward()
    assert held() is None
    torch.testing.assert_close(factor.grad, x.detach().sum(0))
