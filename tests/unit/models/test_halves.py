"""fp32 numbers in two halves: nothing is lost, and the first half is the nearest bf16 number."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritune.models.halves import halved, whole


def numbers() -> st.SearchStrategy[float]:
    """Any that do not round to infinity."""
    return st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126)


@given(st.lists(numbers(), min_size=1, max_size=50))
def test_the_halves_are_the_number_and_the_first_is_its_neighbour(values: list[float]) -> None:
    wide = torch.tensor(values)
    near, rest = halved(wide)
    assert (near.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert [struct.pack("f", v) for v in whole(near, rest).tolist()] == [struct.pack("f", v) for v in wide.tolist()]
    off, best = ((t.double() - wide.double()).abs() for t in (near, wide.bfloat16()))
    assert torch.equal(off, best)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_half_way_the_larger_one_is_near(sign: float) -> None:
    """torch takes the even one; both are as near."""
    between = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8]) * sign
    near, rest = halved(between)
    assert torch.equal(near.double(), torch.tensor([1 + 2.0**-7, 1 + 2.0**-6]).double() * sign)
    assert torch.equal(whole(near, rest), between)
