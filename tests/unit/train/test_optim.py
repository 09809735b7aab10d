"""The learning rate over a run: up in a line, down as asked, never above the peak and never zero while training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tritune.run import Training
from tritune.train.optim import adamw, rate, set_rate


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
    optimizer = adamw({"p": parameter}, Training(weight_decay=0.1))
    set_rate(optimizer, 0.5)
    parameter.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(parameter.data, torch.tensor([2.0, -4.0]) * (1 - 0.5 * 0.1))


def test_every_group_learns_at_its_factor_of_the_rate() -> None:
    """AdamW's first step is the rate itself, whatever the gradient."""
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in "abcd"}
    optimizer = adamw(parameters, Training(), {"a": 0.5, "c": 0.5, "d": 0.1})
    set_rate(optimizer, 0.2)
    for parameter in parameters.values():
        parameter.grad = torch.tensor([1.0, -3.0, 0.2])
    optimizer.step()
    for name, factor in {"a": 0.5, "b": 1.0, "c": 0.5, "d": 0.1}.items():
        torch.testing.assert_close(
            parameters[name].data, -0.2 * factor * torch.tensor([1.0, -1.0, 1.0]), rtol=1e-5, atol=0
        )
