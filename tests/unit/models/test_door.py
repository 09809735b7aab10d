"""The hooks themselves: where each step of the door is called, and with what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.oracles import base_of, packed_logits, rows_of, stock, stock_logits
from tritune.models.base import LINEAR_ROLES, NoEdits, Role, Site

ROWS = rows_of((5, 8))


class Everywhere(NoEdits):
    """Doubles what enters every linear map it may, and keeps what it was shown."""

    def __init__(self, sites: tuple[Site, ...], factor: float) -> None:
        self._sites, self.factor = sites, factor
        self.entered: dict[str, Tensor] = {}
        self.left: dict[str, tuple[Tensor, Tensor]] = {}

    def sites(self) -> tuple[Site, ...]:
        return self._sites

    def enter(self, site: Site, x_ND: Tensor, slot_N: Tensor | None) -> Tensor:
        assert x_ND.shape[1] == site.d_in
        self.entered[site.key] = x_ND
        return x_ND * self.factor

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        assert y_NE.shape[1] == site.d_out
        self.left[site.key] = (x_ND, y_NE)
        return y_NE


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt-neox", "opt", "opt-post-norm"])
def test_enter_is_called_at_matrices_of_one_role_only(name: str) -> None:
    base = base_of(name)
    edits = Everywhere(base.sites, 2.0)
    with torch.no_grad(), base.bind(edits):
        packed_logits(base, ROWS)
    own = {s.key for s in base.sites if s.role in LINEAR_ROLES and not base.weight_of(s)[1].fused}
    assert set(edits.entered) == own
    assert set(edits.left) == {s.key for s in base.sites}
    for key in own:
        assert torch.equal(edits.left[key][0], 2.0 * edits.entered[key]), "edit sees what entered"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("role", [Role.ATTN_O, Role.MLP_DOWN])
def test_what_enters_is_what_the_map_is_given(name: str, role: Role) -> None:
    """A doubled input is a doubled matrix."""
    base = base_of(name)
    model = stock(base)
    sites = tuple(site for site in base.sites if site.role is role)
    for place in base.places:
        if place.site in sites:
            path = next(path for path, module in base.model.named_modules() if module is place.module)
            module = model.get_submodule(path)
            assert isinstance(module.weight, nn.Parameter)
            module.weight.data *= 2
    with torch.no_grad(), base.bind(Everywhere(sites, 2.0)):
        got = packed_logits(base, ROWS)
        for row, logits in zip(ROWS, got, strict=True):
            torch.testing.assert_close(logits, stock_logits(model, row), rtol=1e-4, atol=2e-5)
