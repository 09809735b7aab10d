"""The count of necessary arithmetic against torch's own counter, on a tiny base, and against the laws it has to keep."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Shape, Work, attention_forward, step
from tests.oracles import base_of
from tritune.models.base import LINEAR_ROLES
from tritune.models.pretrained import Base

LENGTH, SUPERVISED = 11, 3


@pytest.fixture(scope="module")
def base() -> Base:
    return base_of("llama")


@pytest.fixture(scope="module")
def shape(base: Base) -> Shape:
    return Shape.of(base.config.to_dict())


def counted(base: Base, *, trained: bool) -> int:
    """Operations that torch counts for one row through stock transformers, forward and, if `trained`, backward."""
    ids = torch.arange(LENGTH)[None] + 5
    model = base.model
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
            for parameter in model.parameters():
                parameter.requires_grad_(trained)
            logits = model(ids, use_cache=False, logits_to_keep=SUPERVISED).logits[0]
            if trained:
                F.cross_entropy(logits, ids[0, :SUPERVISED]).backward()
        return counter.get_total_flops()
    finally:
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None
        model.set_attn_implementation(attention)


def whole_square(shape: Shape) -> int:
    """Eager attention computes the future too and masks it: what that adds to a forward pass."""
    future = LENGTH * LENGTH - LENGTH * (LENGTH + 1) // 2
    return 4 * shape.layers * shape.heads * shape.head_dim * future


def test_trunk_and_head_are_the_base_s_own_weights(base: Base, shape: Shape) -> None:
    linear = {
        id(p.module): p.module.weight.numel()
        for p in base.places
        if p.site.role in LINEAR_ROLES  # type: ignore[operator]
    }
    assert shape.trunk == sum(linear.values())
    assert shape.head == base.embedding.weight.numel()


def test_forward_is_what_torch_counts(base: Base, shape: Shape) -> None:
    work = Work([LENGTH], SUPERVISED)
    expected = 2 * shape.trunk * LENGTH + 2 * shape.head * SUPERVISED + attention_forward(shape, work)
    assert counted(base, trained=False) == expected + whole_square(shape)


def test_full_is_what_torch_counts(base: Base, shape: Shape) -> None:
    expected = step(shape, "full", Work([LENGTH], SUPERVISED)) + 3 * whole_square(shape)
    assert counted(base, trained=True) == expected


def test_the_worked_base_of_the_literature() -> None:
    """SmolLM2-135M: 106.2 million weights in the trunk, 28.3 in the head; full fine-tuning 637 MF a token, LoRA r16 454."""
    smol = Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocabulary=49152)
    assert smol.trunk == pytest.approx(106.2e6, rel=1e-3)
    assert smol.head == pytest.approx(28.3e6, rel=1e-3)
    # no supervised position, one token a row: nearly no attention
    assert step(smol, "full", Work([1], 0)) == pytest.approx(637e6, rel=2e-3)
    lora = step(smol, "lora", Work([1], 0, added=2 * 4_884_480))
    assert lora == pytest.approx(454e6, rel=3e-3)


@pytest.mark.parametrize("kind", ["full", "lora", "ia3", "prefix", "bottleneck", "ptuning"])
def test_rows_add_up(shape: Shape, kind: str) -> None:
    """Rows of a batch cost what they cost alone: nothing is padded."""
    both = step(shape, kind, Work([7, 12], 3, added=10))
    assert both == step(shape, kind, Work([7], 1, added=10)) + step(shape, kind, Work([12], 2, added=10))


def test_a_shared_prompt_is_paid_once(shape: Shape) -> None:
    """Of two rows behind one prompt, the second pays for seeing it, not for computing it."""
    one = step(shape, "ptuning", Work([9], 1, virtual=5))
    two = step(shape, "ptuning", Work([9, 9], 2, virtual=5))
    bare = step(shape, "ptuning", Work([9], 1))
    seeing = 3 * 4 * shape.layers * shape.heads * shape.head_dim * 9 * 5
    assert two - one == bare + seeing


def test_behind_remembered_texts_only_prompts_and_answers_are_computed(shape: Shape) -> None:
    """Five virtual tokens see the nine of the text and their own past; a second row costs as much again."""
    one = step(shape, "ptuning", Work([9], 1, virtual=5, cached=True))
    seeing = 3 * 4 * shape.layers * shape.heads * shape.head_dim * (5 * 9 + 15)
    assert one == 4 * shape.trunk * 5 + 4 * shape.head + seeing
    assert step(shape, "ptuning", Work([9, 9], 2, virtual=5, cached=True)) == 2 * one
    longer = step(
        shape, "ptuning", Work([10], 2, virtual=5, cached=True)
    )  # the first of two answer tokens goes through
    assert longer - one == 4 * shape.trunk + 4 * shape.head + seeing // 60 * (5 * 9 + 15 + 9 + 6 - 60)


def test_given_keys_are_seen_and_not_computed(shape: Shape) -> None:
    pair = 3 * 4 * shape.layers * shape.heads * shape.head_dim
    bare = step(shape, "prefix", Work([9], 1))
    assert step(shape, "prefix", Work([9], 1, keys=5)) - bare == pair * 9 * 5
    behind = step(shape, "prefix", Work([9], 1, virtual=1, keys=5, cached=True))
    assert behind == 4 * shape.trunk + 4 * shape.head + pair * (9 + 5 + 1)


def test_an_uncounted_method_is_refused(shape: Shape) -> None:
    with pytest.raises(KeyError, match="unheard-of"):
        step(shape, "unheard-of", Work([3], 1))
