"""LoRA: a low-rank term beside each linear map, y = Wx + s B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3).

With rank-stabilised scaling s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), else alpha / r.
Shapes: r rank, D and E input and output width of a site, N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tritune.methods.base import Budget, Delta, Method, linear_roles, sites_of
from tritune.models.base import LowRank, Role, Site
from tritune.models.load import Base
from tritune.spec import MethodConfig, Strategy


class LoRA(MethodConfig):
    """Low-rank adaptation.

    rank: r, width of the learned term.
    alpha: its weight; the term is multiplied by alpha / rank.
    rank_stabilised: multiply by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones.
    dropout: share of the inputs of A set to zero while training.
    roles: linear roles to adapt ("attn.q", "mlp.down", ...); null: all that the base has.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    rank_stabilised: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    roles: tuple[Role, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def sites(self, base: Base) -> tuple[Site, ...]:
        return sites_of(base, linear_roles(base) if self.roles is None else self.roles)


class LoraDelta(Delta):
    """A (r, D) and B (E, r) per site."""

    def __init__(self, config: LoRA, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(sites)
        self.config = config
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        x_ND = F.dropout(x_ND, self.config.dropout, self.training)
        A_rD, B_Er = self.part(site, "A").to(x_ND.dtype), self.part(site, "B").to(x_ND.dtype)
        added: Tensor = _LowRank.apply(x_ND, y_NE, A_rD, B_Er, self.config.scale)  # type: ignore[no-untyped-call]
        return added

    def low_rank(self, site: Site) -> LowRank | None:
        if self.training and self.config.dropout:
            return None
        return LowRank(self.part(site, "A"), self.part(site, "B"), self.config.scale)

    def export(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainable().items()}


class _LowRank(torch.autograd.Function):
    """y + s (x Aᵀ) Bᵀ, with the backward written out: B's gradient as (hᵀ g)ᵀ, several times faster than gᵀ h where the
    rank is small, and nothing saved but x and h. `reference_low_rank` is its slow twin."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, y_NE: Tensor, A_rD: Tensor, B_Er: Tensor, scale: float) -> Tensor:
        h_Nr = x_ND @ A_rD.T
        ctx.save_for_backward(x_ND, h_Nr, A_rD, B_Er)
        ctx.scale = scale
        return torch.addmm(y_NE, h_Nr, B_Er.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None, None]:
        x_ND, h_Nr, A_rD, B_Er = ctx.saved_tensors
        wants_x, _, wants_A, wants_B, _ = ctx.needs_input_grad
        back_Nr = (g_NE @ B_Er).mul_(ctx.scale)
        return (
            back_Nr @ A_rD if wants_x else None,
            g_NE,
            back_Nr.T @ x_ND if wants_A else None,
            (h_Nr.T @ g_NE).mul_(ctx.scale).T if wants_B else None,
            None,
        )


def reference_low_rank(x_ND: Tensor, y_NE: Tensor, A_rD: Tensor, B_Er: Tensor, scale: float) -> Tensor:
    """The same by autograd: the oracle of the tests."""
    return y_NE + scale * F.linear(F.linear(x_ND, A_rD), B_Er)


class LoraMethod(Method[LoRA]):
    kind = "lora"
    strategy = Strategy.ADAPTERS
    Config = LoRA
    summary = "a low-rank term beside each linear map; the base is frozen"
    learning_rate = 1e-3
    variants: ClassVar = (
        LoRA(rank=3),
        LoRA(rank=4, alpha=4.0, rank_stabilised=True, dropout=0.2, roles=(Role.ATTN_Q, Role.ATTN_V)),
        LoRA(rank=2, roles=(Role.MLP_DOWN,)),
    )

    def budget(self, config: LoRA, base: Base) -> Budget:
        n = sum(config.rank * (site.d_in + site.d_out) for site in config.sites(base))
        return Budget(trained=n, stored=n, stored_bytes=4 * n, added_flops=2 * n)

    def shapes(self, config: LoRA, base: Base) -> Mapping[str, tuple[int, ...]]:
        sites = config.sites(base)
        return {f"{s.key}.A": (config.rank, s.d_in) for s in sites} | {
            f"{s.key}.B": (s.d_out, config.rank) for s in sites
        }

    def init(self, config: LoRA, base: Base, rng: torch.Generator) -> Delta:
        tensors = {}
        for name, shape in self.shapes(config, base).items():
            bound = 1 / math.sqrt(shape[1])  # kaiming-uniform with a = sqrt(5), as in the reference code
            start = (
                torch.empty(shape).uniform_(-bound, bound, generator=rng) if name.endswith(".A") else torch.zeros(shape)
            )
            tensors[name] = start.to(base.device)
        return LoraDelta(config, config.sites(base), tensors)

    def _load(self, config: LoRA, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return LoraDelta(config, config.sites(base), {n: t.to(base.device) for n, t in tensors.items()})

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        assert isinstance(delta, LoraDelta)
        merged: dict[str, Tensor] = {}
        for site in delta.sites():
            name, rows = base.weight_of(site)
            weight = merged.get(name, base.parameters()[name].detach().float())
            term_ED = delta.config.scale * (delta.part(site, "B") @ delta.part(site, "A")).detach()
            merged[name] = rows.add_to(weight, term_ED)
        return {name: weight.to(base.dtype) for name, weight in merged.items()}


METHOD = LoraMethod()
