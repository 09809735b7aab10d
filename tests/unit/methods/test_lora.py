"""LoRA's written-out backward against its slow twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritune.methods.lora import _LowRank, reference_low_rank


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_the_fast_backward_equals_the_slow_twin(n: int, d_in: int, d_out: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, d_in), (n, d_out), (rank, d_in), (d_out, rank))
    fast = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    slow = [t.detach().clone().requires_grad_() for t in fast]
    weight = torch.randn(n, d_out, generator=generator, dtype=torch.float64)
    a, b = _LowRank.apply(*fast, 1.7), reference_low_rank(*slow, 1.7)
    torch.testing.assert_close(a, b)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    for x, y in zip(fast, slow, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("needed", range(4))
def test_only_what_is_asked_for_gets_a_gradient(needed: int) -> None:
    tensors = [torch.randn(s) for s in ((3, 4), (3, 5), (2, 4), (5, 2))]
    tensors[needed].requires_grad_()
    _LowRank.apply(*tensors, 0.5).sum().backward()
    assert [t.grad is not None for t in tensors] == [i == needed for i in range(4)]
