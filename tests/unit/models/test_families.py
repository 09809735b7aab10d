"""Every family: packed rows, shared segments and virtual prompts against stock transformers.

A family without a tiny config fails here; a broken attention function makes these same checks red (last section).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from tests import oracles
from tests.oracles import base_of, packed_logits, rows_of, stock_logits, stock_of
from tests.unit.models.family_checks import CHECKS, CLOSE, LENGTHS, Prompt, each_base, prompt_of
from tritune.errors import UnsupportedBase
from tritune.models import attention, fast, group, tiny
from tritune.models.base import Batch, Segment, Span
from tritune.models.probe import probe
from tritune.models.sites import FAMILIES
from tritune.models.tiny import CONFIGS, tiny_base

# --- the table ---


def test_every_family_has_a_tiny_config() -> None:
    assert set(FAMILIES) == {kind for kind, _ in CONFIGS.values()}


@each_base
def test_the_tiny_config_is_of_the_family_it_says(name: str) -> None:
    assert base_of(name).config.model_type == CONFIGS[name][0]


# --- packed, shared, virtual ---


@each_base
@pytest.mark.parametrize("check", CHECKS)
def test_against_stock_transformers(name: str, check: str) -> None:
    CHECKS[check](name)


@each_base
@torch.no_grad()
def test_each_slot_gets_its_own_prompt(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS, seed=4)
    prompts = {0: prompt_of(base, 3, 1), 1: prompt_of(base, 6, 2)}
    slots = (1, 0, -1, 1, 0, 0, -1)
    with base.bind(Prompt([Segment(p, slot) for slot, p in prompts.items()])):
        packed = packed_logits(base, rows, slots)
    for row, slot, logits in zip(rows, slots, packed, strict=True):
        torch.testing.assert_close(logits, stock_logits(model, row, prompts.get(slot)), **CLOSE)


def test_two_prompts_for_one_slot_are_refused() -> None:
    base = base_of("llama")
    twice = Prompt([Segment(prompt_of(base, 2), 0), Segment(prompt_of(base, 3), 0)])
    with base.bind(twice), pytest.raises(AssertionError, match="two segments"):
        packed_logits(base, rows_of((4,)), (0,))


@each_base
def test_gradients_of_a_shared_prompt_are_the_sum_over_prepended_rows(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS, seed=5)
    prompt = prompt_of(base, 4).requires_grad_(True)
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(len(row), tiny.VOCABULARY, generator=generator) for row in rows]
    with base.bind(Prompt([Segment(prompt)])):
        total = sum((logits * w).sum() for logits, w in zip(packed_logits(base, rows), weights, strict=True))
    (got,) = torch.autograd.grad(total, prompt)
    wanted = torch.zeros_like(got)
    for row, w in zip(rows, weights, strict=True):
        wanted += torch.autograd.grad((stock_logits(model, row, prompt) * w).sum(), prompt)[0]
    assert float(wanted.abs().max()) > 1e-2
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@each_base
@torch.no_grad()
def test_the_head_runs_on_the_asked_positions_only(name: str) -> None:
    base = base_of(name)
    rows = rows_of((4, 6))
    batch = Batch(torch.tensor([*rows[0], *rows[1]]), (Span(0, 4), Span(4, 6)))
    seen: list[int] = []
    head = base.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).shape[0])
    )
    try:
        some = base.logits(batch, torch.tensor([9, 2, 2]))
    finally:
        handle.remove()
    assert seen == [3]
    torch.testing.assert_close(some, base.logits(batch, torch.arange(10))[[9, 2, 2]], **CLOSE)


@each_base
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_other_number_formats_pass_the_probe_and_give_wide_logits(name: str, dtype: torch.dtype) -> None:
    base = tiny_base(name, dtype=dtype)
    assert base.dtype is dtype
    (logits,) = packed_logits(base, rows_of((9,)))
    assert logits.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    (wanted,) = packed_logits(base_of(name), rows_of((9,)))
    spread = float(wanted.std())
    difference = float((logits.double() - wanted.double()).square().mean().sqrt())
    assert difference < (0.1 if dtype is torch.bfloat16 else 1e-4) * spread


@torch.no_grad()
def test_positions_that_depend_on_the_longest_row_limit_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3 128k computes other positions for every row of a batch as soon as one row is long."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.2, 1.4, 1.6],
        "long_factor": [2.0, 3.0, 4.0, 8.0],
        "original_max_position_embeddings": 20,
    }
    kind, options = CONFIGS["phi3"]
    options = {**options, "rope_parameters": rope, "original_max_position_embeddings": 20}
    monkeypatch.setattr(tiny, "CONFIGS", {"phi3-long": (kind, options)})
    base = tiny_base("phi3-long")
    assert base.max_positions == 20
    model = oracles.stock(base)
    rows = rows_of((5, 20, 9))
    for row, logits in zip(rows, packed_logits(base, rows), strict=True):
        torch.testing.assert_close(logits, stock_logits(model, row), **CLOSE)


# --- would these checks notice? ---


def broken_window(self: group.Group, window: int | None, queries: slice = slice(None)) -> Tensor:
    return _hidden(self, None if window is None else window + 1, queries)


def broken_causality(self: group.Group, window: int | None, queries: slice = slice(None)) -> Tensor:
    one_ahead = _hidden(self, window, queries).roll(1, dims=2)
    one_ahead[..., 0] = False
    return one_ahead


def without(option: str) -> Callable[..., Any]:
    def broken(*args: Any, **kwargs: Any) -> Any:
        return attention.packed_attention(*args, **{**kwargs, option: None})

    return broken


_hidden = group.Group.hidden
_SLIDING = ("mistral", "gemma2", "gemma3", "phi3")
MUTATIONS: dict[str, tuple[tuple[str, ...], Callable[[pytest.MonkeyPatch], None]]] = {
    "a window one too wide": (_SLIDING, lambda m: m.setattr(group.Group, "hidden", broken_window)),
    "a window ignored": (_SLIDING, lambda m: register(m, without("sliding_window"))),
    "a soft cap ignored": (("gemma2",), lambda m: register(m, without("softcap"))),
    "the model's scaling ignored": (("opt", "gemma2", "gemma3"), lambda m: register(m, without("scaling"))),
    "one key ahead": (tuple(CONFIGS), lambda m: m.setattr(group.Group, "hidden", broken_causality)),
}


def register(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, function)
    monkeypatch.setattr(fast, "packed_attention", function)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_attention_function_is_noticed(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    """By the checks above, and by the probe that every base goes through at load."""
    names, mutate = MUTATIONS[mutation]
    for name in names:
        base_of(name)
        stock_of(name)
    mutate(monkeypatch)
    for name in names:
        for check in CHECKS.values():
            with pytest.raises(AssertionError):
                check(name)
        with pytest.raises(UnsupportedBase, match=f"tiny-{name}"):
            probe(base_of(name))
