"""Compiled regions on a processor: the same losses and gradients as the written-out kernels, or no compiling at all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.unit.models.test_fast import loss_and_slopes
from tritune.methods.full import Full
from tritune.methods.lora import LoRA
from tritune.models import kernels, regions
from tritune.models.tiny import tiny_base


@pytest.fixture
def compiling() -> Iterator[None]:
    regions.use(True)
    yield
    regions.use(False)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    regions.use(True)
    try:
        assert not regions.in_use(torch.ones(1))
    finally:
        regions.use(False)


def test_nothing_is_compiled_unasked() -> None:
    assert not regions.in_use(torch.ones(1))


@pytest.mark.usefixtures("compiling")
def test_a_base_learns_the_same_compiled() -> None:
    """Where there is no compiler both sides are the kernels; the project's own checks run where there is one."""
    base = tiny_base("llama")
    kinds = LoRA(rank=2), Full()
    found = [loss_and_slopes(base, kind, True) for kind in kinds]
    regions.use(False)
    for kind, (loss, slopes) in zip(kinds, found, strict=True):
        wanted, of_kernels = loss_and_slopes(base, kind, True)
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert slopes.keys() == of_kernels.keys()
        for name, slope in of_kernels.items():
            torch.testing.assert_close(slopes[name], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()) + 1e-9)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("rows", [5, 8])
def test_narrow_numbers_round_where_the_kernels_round(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, g = (torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, 64), (64,), (rows, 64)))
    both, g_half = torch.randn(rows, 64, generator=generator).bfloat16(), g[:, :32].contiguous()

    def found() -> list[torch.Tensor]:
        inputs = x.clone().requires_grad_(), both.clone().requires_grad_()
        normed, gated = kernels.rms_norm(inputs[0], weight, 1e-5), kernels.swiglu(inputs[1])
        torch.autograd.backward((normed, gated), (g, g_half))
        return [normed.detach(), gated.detach(), *(t.grad for t in inputs if t.grad is not None)]

    compiled = found()
    regions.use(False)
    for a, b in zip(compiled, found(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
