"""The learning rate over a run: up in a line, down as asked, never above the peak and never zero while training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tritune.models.halves import halved, whole
from tritune.run import Training
from tritune.train import optim
from tritune.train.optim import AdamW, clipping, rate


def rates(schedule: str, total: int, warmup: float, peak: float = 1.0) -> list[float]:
    training = Training(schedule=schedule, warmup=warmup)  # type: ignore[arg-type]
    return [rate(training, peak, step, total) for step in range(1, total + 1)]


def test_linear_with_warm_up_spelled_out() -> None:
    wanted = [0.5, 1.0, *(left / 9 for left in range(8, 0, -1))]
    assert rates("linear", 10, 0.2) == pytest.approx(wanted)


def test_cosine_spelled_out() -> None:
    wanted = [1.0, *(0.5 + 0.5 * math.cos(math.pi * i / 5) for i in range(1, 5))]
    assert rates("cosine", 5, 0.2) == pytest.approx(wanted)


def test_constant_stays() -> None:
    assert rates("constant", 5, 0.0, peak=0.25) == [0.25] * 5


@given(
    st.sampled_from(("linear", "cosine", "constant")),
    st.integers(1, 300),
    st.floats(0, 0.99),
    st.floats(1e-6, 10.0),
)
def test_it_rises_then_falls_and_stays_within_the_peak(schedule: str, total: int, warmup: float, peak: float) -> None:
    found = rates(schedule, total, warmup, peak)
    assert all(0 < r <= peak * (1 + 1e-12) for r in found)
    top = math.ceil(warmup * total)
    rise, fall = found[:top], found[top:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    if top:
        assert max(found) == pytest.approx(peak)


def test_the_optimizer_is_adamw_with_decoupled_decay() -> None:
    """A parameter without gradient signal shrinks by rate x decay and by nothing else."""
    parameter = nn.Parameter(torch.tensor([2.0, -4.0]))
    optimizer = AdamW({"p": parameter}, weight_decay=0.1)
    parameter.grad = torch.zeros(2)
    optimizer.take(0.5)
    torch.testing.assert_close(parameter.data, torch.tensor([2.0, -4.0]) * (1 - 0.5 * 0.1))


def test_every_group_learns_at_its_factor_of_the_rate() -> None:
    """AdamW's first step is the rate itself, whatever the gradient."""
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in "abcd"}
    optimizer = AdamW(parameters, factors={"a": 0.5, "c": 0.5, "d": 0.1})
    for parameter in parameters.values():
        parameter.grad = torch.tensor([1.0, -3.0, 0.2])
    optimizer.take(0.2)
    for name, factor in {"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.1}.items():
        torch.testing.assert_close(
            parameters[name].data, -0.2 * factor * torch.tensor([1.0, -1.0, 1.0]), rtol=1e-5, atol=0
        )


def drawn(seed: int, steps: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """fp32 weights, and for every step gradients that bf16 holds exactly; one weight has none in the second step."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 33), "b": (5,), "c": (4, 3, 2)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found = [
        {name: torch.randn(shape, generator=generator).bfloat16().float() for name, shape in shapes.items()}
        for _ in range(steps)
    ]
    del found[1]["c"]
    return start, found


@pytest.mark.parametrize("seed", range(3))
def test_masters_in_halves_step_bit_for_bit_as_whole_ones(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Against torch's own optimizer on fp32 parameters, clipping included; parameters in pieces of any size."""
    monkeypatch.setattr(optim, "PIECE", 50)
    start, gradients = drawn(seed, steps=6)
    wide = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    plain = torch.optim.AdamW(list(wide.values()), lr=0.01, weight_decay=0.1, fused=True)
    parts = {name: halved(t) for name, t in start.items()}
    near, rests = ({name: part[i] for name, part in parts.items()} for i in (0, 1))
    parameters = {name: nn.Parameter(t) for name, t in near.items()}
    optimizer = AdamW(parameters, 0.1, rests=rests)
    for found in gradients:
        for name, gradient in found.items():
            wide[name].grad = gradient / 4
            parameters[name].grad = gradient.bfloat16()
        plain.step()
        plain.zero_grad(set_to_none=True)
        optimizer.take(0.01, shrink=0.25)
        for name, p in parameters.items():
            assert p.grad is None
            assert torch.equal(whole(p.data, rests[name]), wide[name].data), name
            assert bool(((p.data.float() - wide[name].data).abs() <= (wide[name].data * 2.0**-8).abs()).all())


def test_the_state_of_an_optimizer_is_all_it_needs() -> None:
    start, gradients = drawn(7, steps=4)

    def run(stop: int | None) -> dict[str, Tensor]:
        parameters = {name: nn.Parameter(t.clone()) for name, t in start.items()}
        optimizer = AdamW(parameters)
        for i, found in enumerate(gradients):
            if i == stop:
                state = {key: t.clone() for key, t in optimizer.state().items()}
                optimizer = AdamW(parameters)
                optimizer.restore(state.items())
            for name, gradient in found.items():
                parameters[name].grad = gradient.clone()
            optimizer.take(0.01)
        return {name: p.data for name, p in parameters.items()}

    assert all(torch.equal(t, run(None)[name]) for name, t in run(2).items())
    assert not all(torch.equal(t, run(None)[name]) for name, t in run_forgetting(start, gradients).items())


def run_forgetting(start: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """With a fresh optimizer at every step."""
    parameters = {name: nn.Parameter(t.clone()) for name, t in start.items()}
    for found in gradients:
        for name, gradient in found.items():
            parameters[name].grad = gradient.clone()
        AdamW(parameters).take(0.01)
    return {name: p.data for name, p in parameters.items()}


def test_gradients_in_several_parts_are_added_up_in_fp32() -> None:
    """256 parts of 1, to which bf16 numbers cannot add a 1 any more."""
    near, rest = halved(torch.ones(4))
    parameter = nn.Parameter(near)
    optimizer = AdamW({"p": parameter}, rests={"p": rest}, summed=True)
    for _ in range(300):
        parameter.sum().backward()  # type: ignore[no-untyped-call]
    assert optimizer.norm() == pytest.approx(600.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_is_that_of_all_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = {str(i): nn.Parameter(torch.zeros(s, dtype=dtype)) for i, s in enumerate([(60, 50), (40,), (8, 9)])}
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    wanted = torch.cat([p.grad.double().flatten() for p in parameters.values() if p.grad is not None]).norm()
    assert AdamW(parameters).norm() == pytest.approx(float(wanted), rel=1e-3 if dtype is torch.bfloat16 else 1e-6)


@given(st.floats(0, 1e6), st.floats(1e-3, 1e3))
def test_clipped_gradients_are_as_long_as_they_may_be(norm: float, most: float) -> None:
    shrink = clipping(norm, most)
    assert norm * shrink <= most * (1 + 1e-6)
    assert shrink == 1 or norm > most * (1 - 1e-5)
    assert clipping(norm, None) == 1
