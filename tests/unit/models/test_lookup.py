"""Trained embeddings: torch's own lookup is the oracle, alone and beside a tied head; sums in bf16 lose less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.laws.conftest import training_rows
from tests.oracles import base_of
from tritune.methods.full import METHOD, Full
from tritune.models.lookup import lookup
from tritune.models.pretrained import Base
from tritune.text.pack import training_batch
from tritune.train.loop import batch_loss

V, D = 40, 8


def inputs(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, tokens, weights of the loss at every row, what the head reads."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return normal(V, D), torch.randint(V, (n,), generator=rng), normal(n, D), normal(3, D)


def gradient(table: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    table = table.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(table), [table])
    return grad


@given(st.integers(1, 200), st.integers(0, 2**31), st.sampled_from([None, 0, 7]), st.booleans())
def test_rows_and_gradients_are_torchs(n: int, seed: int, padding: int | None, tied: bool) -> None:
    table, tokens, share, x = inputs(n, seed)

    def ours(weight: Tensor) -> Tensor:
        rows, again = lookup(weight, tokens, padding)
        assert torch.equal(rows, weight[tokens])
        return (rows * share).sum() + (F.linear(x, again).square().sum() if tied else 0)

    def torchs(weight: Tensor) -> Tensor:
        rows = F.embedding(tokens, weight, padding_idx=padding)
        return (rows * share).sum() + (F.linear(x, weight).square().sum() if tied else 0)

    torch.testing.assert_close(gradient(table, ours), gradient(table, torchs))


def test_a_head_alone_learns_as_ever() -> None:
    table, tokens, _, x = inputs(5, 0)
    found = gradient(table, lambda weight: F.linear(x, lookup(weight, tokens)[1]).square().sum())
    torch.testing.assert_close(found, gradient(table, lambda weight: F.linear(x, weight).square().sum()))


@pytest.mark.parametrize("seed", range(3))
def test_what_a_word_is_told_often_is_not_lost_in_bf16(seed: int) -> None:
    """A word that is read a thousand times: each gradient is below what a sum in bf16 still takes in."""
    table, _, share, _ = inputs(1000, seed, torch.bfloat16)
    tokens, share = torch.zeros(1000, dtype=torch.long), share.abs()
    exact = share.double().sum(0)
    ours = gradient(table, lambda weight: (lookup(weight, tokens)[0] * share).sum())[0]
    torchs = gradient(table, lambda weight: (F.embedding(tokens, weight) * share).sum())[0]
    assert float(((ours.double() - exact) / exact).abs().max()) <= 2**-8
    assert float(((torchs.double() - exact) / exact).abs().max()) > 0.1


class TablesMade(TorchDispatchMode):
    """Counts new tensors as large as a table."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.addresses = size, set[int]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.numel() == self.size:
            self.addresses.add(found.data_ptr())
        return found


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "gpt2"])
def test_full_fine_tuning_of_a_tied_base_makes_one_gradient_of_the_table(name: str) -> None:
    base: Base = base_of(name)
    assert base.model.get_output_embeddings().weight is base.embedding.weight
    delta = METHOD.init(Full(), base, torch.Generator())
    with base.bind(delta):
        loss = batch_loss(base, training_batch(training_rows()))
        with TablesMade(base.embedding.weight.numel()) as made:
            loss.backward()
    assert len(made.addresses - {weight.data_ptr() for weight in delta.weights().values()}) == 1
