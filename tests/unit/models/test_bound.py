"""Edits leave nothing behind on a base, and two sets of them never meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of, packed_logits, rows_of
from tests.unit.models.family_checks import Prompt, Recorder, Term, each_base, prompt_of
from tritune.models.base import Edits, NoEdits, Role, Segment, Site
from tritune.models.pretrained import Base


@each_base
def test_edits_leave_nothing_behind_even_when_they_fail(name: str) -> None:
    base = base_of(name)

    class Failing(Recorder):
        def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
            raise RuntimeError("on purpose")

    hooks = count_hooks(base)
    before = packed_logits(base, rows_of((5,)))[0]
    with pytest.raises(RuntimeError, match="on purpose"), base.bind(Failing(base)):
        packed_logits(base, rows_of((5,)))
    assert count_hooks(base) == hooks
    assert not base._stream.entered, "a failed forward pass keeps activations alive"
    assert torch.equal(packed_logits(base, rows_of((5,)))[0], before)


def count_hooks(base: Base) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.model.modules())


def test_two_edits_at_once_are_refused() -> None:
    base = base_of("llama")
    prompt = Prompt([Segment(prompt_of(base, 2))])
    with base.bind(prompt), pytest.raises(AssertionError, match="already bound"), base.bind(prompt):
        pass
    with base.bind(prompt):  # and the refusal did not lock it
        pass


def test_sites_that_a_base_lacks_are_refused() -> None:
    base = base_of("llama")
    stranger = Term(Site("layers.9.attn.q", Role.ATTN_Q, 9, 32, 32), torch.zeros(32, 32))
    with pytest.raises(AssertionError, match=r"layers\.9\.attn\.q"), base.bind(stranger):
        pass
    with base.bind(NoEdits()):
        pass


def test_edits_are_a_protocol_that_doing_nothing_fulfils() -> None:
    nothing: Edits = NoEdits()
    y = torch.ones(2, 3)
    assert nothing.edit(base_of("llama").sites[0], torch.ones(2, 2), y, None) is y
    assert not nothing.sites()
    assert not nothing.segments()
    assert not nothing.weights()
