"""Fused modules taken apart and put together: inverse to each other, and the same product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import base_of
from tritune.exchange.modules import LinearModule, LowRank, fuse, linear_modules, split


def fused(name: str) -> LinearModule:
    return next(module for module in linear_modules(base_of(name)).values() if len(module.sites) > 1)


def terms(module: LinearModule, rank: int, keys: list[str], seed: int, wider: int = 0) -> dict[str, LowRank]:
    """`wider`: how much larger the rank is from site to site."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i, (site, _) in enumerate(module.sites):
        if site.key in keys:
            r = rank + i * wider
            A_rD, B_Er = (
                torch.randn(r, module.d_in, generator=generator),
                torch.randn(site.d_out, r, generator=generator),
            )
            found[site.key] = LowRank(A_rD, B_Er, 2.0)
    return found


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
@given(rank=st.integers(1, 5), present=st.integers(1, 7), seed=st.integers(0, 99), wider=st.integers(0, 2))
@settings(max_examples=20, deadline=None)
def test_fused_terms_come_apart_as_they_were(name: str, rank: int, present: int, seed: int, wider: int) -> None:
    module = fused(name)
    keys = [site.key for i, (site, _) in enumerate(module.sites) if present >> i & 1] or [module.sites[0][0].key]
    given_terms = terms(module, rank, keys, seed, wider)
    whole = fuse(module, given_terms, shared=False)
    back = split(module, whole)
    assert back.keys() == given_terms.keys()
    for key, term in back.items():
        assert torch.equal(term.A, given_terms[key].A)
        assert torch.equal(term.B, given_terms[key].B)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
@given(rank=st.integers(1, 7), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_any_term_of_a_fused_module_comes_together_as_it_was(name: str, rank: int, seed: int) -> None:
    module = fused(name)
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, module.d_in, generator=generator), torch.randn(module.d_out, rank, generator=generator)
    parts = split(module, LowRank(A, B, 0.5))
    again = fuse(module, parts, shared=True)
    assert torch.equal(again.A, A)
    assert torch.equal(again.B, B)


def test_sites_of_other_scales_share_the_first_ones() -> None:
    """PEFT has one scale for a whole matrix."""
    module = fused("gpt2")
    mine = terms(module, 2, [site.key for site, _ in module.sites], 0, wider=1)
    last = module.sites[-1][0].key
    mine[last] = LowRank(mine[last].A, mine[last].B, 0.5)
    whole = fuse(module, mine, shared=False)
    product = whole.scale * whole.B @ whole.A
    for site, columns in module.sites:
        term = mine[site.key]
        torch.testing.assert_close(product[module.rows_of(columns)], term.scale * term.B @ term.A)


def test_interleaved_rows_go_to_their_heads() -> None:
    """GPT-NeoX keeps q, k, v of one head after the other: the rows of a site are no run."""
    module = fused("gpt-neox")
    whole = fuse(module, terms(module, 2, [module.sites[1][0].key], 0), shared=False)
    used = whole.B.any(dim=1).nonzero()[:, 0].tolist()
    width = 8
    assert used == [3 * width * head + width + i for head in range(4) for i in range(width)]
