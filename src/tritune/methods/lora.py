"""LoRA: a low-rank term beside each linear map, y = Wx + s B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3).

With rank-stabilised scaling s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), else alpha / r.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) start from a part of W itself and
take that part out of the base: y = (W - s B0 A0) x + s B A x. Here the base stays as it is and the term is s (B A - B0 A0):
a term of rank 2 r, which is what is exported, as PEFT converts its own. Over a bf16 base both parts are rounded.
Shapes: r rank, D and E input and output width of a site, N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tritune.errors import Mismatch, Problem
from tritune.methods.base import Budget, Delta, Method, linear_roles, sites_of
from tritune.models.base import LowRank, Role, Site
from tritune.models.dtype import at_least_float32
from tritune.models.load import Base
from tritune.spec import MethodConfig, Strategy


class LoRA(MethodConfig):
    """Low-rank adaptation.

    rank: r, width of the learned term.
    alpha: its weight; the term is multiplied by alpha / rank.
    rank_stabilised: multiply by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones.
    dropout: share of the inputs of A set to zero while training.
    roles: linear roles to adapt ("attn.q", "mlp.down", ...); null: all that the base has.
    ranks, alphas: rank and alpha of single roles, {"mlp.down": 16}, where they differ.
    start: "zero": B at zero, A at random; "pissa": the largest singular values of W; "olora": the first columns of its QR
        decomposition. The adapted base starts as the bare one in each.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    rank_stabilised: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    roles: tuple[Role, ...] | None = None
    ranks: Mapping[Role, Annotated[int, Field(ge=1)]] = {}
    alphas: Mapping[Role, Annotated[float, Field(gt=0)]] = {}
    start: Literal["zero", "pissa", "olora"] = "zero"

    @property
    def scale(self) -> float:
        """Of all roles that `ranks` and `alphas` say nothing of."""
        return self._scale(self.rank, self.alpha)

    def rank_at(self, site: Site) -> int:
        return self.ranks.get(site.role, self.rank)

    def stored_rank_at(self, site: Site) -> int:
        """Rank of what is exported: a start that is no zero stays in it."""
        return self.rank_at(site) * (1 if self.start == "zero" else 2)

    def scale_at(self, site: Site) -> float:
        return self._scale(self.rank_at(site), self.alphas.get(site.role, self.alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def sites(self, base: Base) -> tuple[Site, ...]:
        """
        Raises:
            Mismatch: roles that the base lacks or that are not adapted, or ranks above what a start can fill.
        """
        sites = sites_of(base, linear_roles(base) if self.roles is None else self.roles)
        adapted = {site.role for site in sites}
        problems = [
            Problem(f"{option}, role '{role}'", "is not adapted")
            for option, given in (("ranks", self.ranks), ("alphas", self.alphas))
            for role in given
            if role not in adapted
        ]
        widest = {site.role: (self.rank_at(site), min(site.d_in, site.d_out)) for site in sites}
        problems += [
            Problem(f"rank of '{role}'", f"{rank}, but start '{self.start}' has only {most} directions")
            for role, (rank, most) in widest.items()
            if self.start != "zero" and rank > most
        ]
        Mismatch.check(f"LoRA cannot be set up so on {base.name}.", problems)
        return sites


class LoraDelta(Delta):
    """A (r, D) and B (E, r) per site.

    Args:
        start: the A and B that training began with, where they were taken from the base: their product is subtracted.
    """

    def __init__(
        self,
        config: LoRA,
        sites: Sequence[Site],
        tensors: Mapping[str, Tensor],
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(sites)
        self.config = config
        for name, tensor in tensors.items():
            self.put(name, tensor)
        for name, tensor in (start or {}).items():
            self.register_buffer(f"start/{name}".replace(".", "/"), at_least_float32(tensor).clone())

    def part(self, site: Site, name: str) -> Tensor:
        """A or B with what is subtracted beside what is learned: A (2r, D), B (E, 2r) where there is a start."""
        learned = super().part(site, name)
        start = self._buffers.get(f"start/{site.key}.{name}".replace(".", "/"))
        if start is None:
            return learned
        return torch.cat([learned, start]) if name == "A" else torch.cat([learned, -start], dim=1)

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        x_ND = F.dropout(x_ND, self.config.dropout, self.training)
        A_rD, B_Er = self.part(site, "A").to(x_ND.dtype), self.part(site, "B").to(x_ND.dtype)
        added: Tensor = _LowRank.apply(x_ND, y_NE, A_rD, B_Er, self.config.scale_at(site))  # type: ignore[no-untyped-call]
        return added

    def low_rank(self, site: Site) -> LowRank | None:
        if self.training and self.config.dropout:
            return None
        return LowRank(self.part(site, "A"), self.part(site, "B"), self.config.scale_at(site))

    def export(self) -> dict[str, Tensor]:
        return {f"{s.key}.{name}": self.part(s, name).detach().clone() for name in ("A", "B") for s in self.sites()}


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
        LoRA(rank=2, roles=(Role.MLP_DOWN,), start="pissa"),
        LoRA(
            rank=3,
            alpha=3.0,
            roles=(Role.ATTN_Q, Role.ATTN_V),
            ranks={Role.ATTN_V: 1},
            alphas={Role.ATTN_V: 0.5},
            start="olora",
        ),
    )

    def budget(self, config: LoRA, base: Base) -> Budget:
        sites = config.sites(base)
        trained = sum(config.rank_at(site) * (site.d_in + site.d_out) for site in sites)
        stored = sum(config.stored_rank_at(site) * (site.d_in + site.d_out) for site in sites)
        return Budget(trained=trained, stored=stored, stored_bytes=4 * stored, added_flops=2 * stored)

    def shapes(self, config: LoRA, base: Base) -> Mapping[str, tuple[int, ...]]:
        sites = config.sites(base)
        return {f"{s.key}.A": (config.stored_rank_at(s), s.d_in) for s in sites} | {
            f"{s.key}.B": (s.d_out, config.stored_rank_at(s)) for s in sites
        }

    def init(self, config: LoRA, base: Base, rng: torch.Generator) -> Delta:
        sites = config.sites(base)
        if config.start != "zero":
            start = _from_weights(config, base, sites)
            return LoraDelta(config, sites, start, start)
        tensors = {}
        for name, shape in self.shapes(config, base).items():
            bound = 1 / math.sqrt(shape[1])  # kaiming-uniform with a = sqrt(5), as in the reference code
            random = name.endswith(".A")
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=rng) if random else torch.zeros(shape)
            tensors[name] = drawn.to(base.device)
        return LoraDelta(config, sites, tensors)

    def _load(self, config: LoRA, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return LoraDelta(config, config.sites(base), {n: t.to(base.device) for n, t in tensors.items()})

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        assert isinstance(delta, LoraDelta)
        merged: dict[str, Tensor] = {}
        for site in delta.sites():
            name, rows = base.weight_of(site)
            weight = merged.get(name, base.parameters()[name].detach().float())
            term_ED = delta.config.scale_at(site) * (delta.part(site, "B") @ delta.part(site, "A")).detach()
            merged[name] = rows.add_to(weight, term_ED)
        return {name: weight.to(base.dtype) for name, weight in merged.items()}


def _from_weights(config: LoRA, base: Base, sites: Sequence[Site]) -> dict[str, Tensor]:
    """A and B whose scaled product is the part of each site's matrix that PiSSA or OLoRA takes out of it."""
    own = base.parameters()
    tensors = {}
    for site in sites:
        name, rows = base.weight_of(site)
        weight_ED = at_least_float32(rows.of(own[name].detach()))
        r = config.rank_at(site)
        if config.start == "pissa":
            U_EK, S_K, V_KD = torch.linalg.svd(weight_ED, full_matrices=False)
            root_r = (S_K[:r] / config.scale_at(site)).sqrt()
            A_rD, B_Er = root_r[:, None] * V_KD[:r], U_EK[:, :r] * root_r
        else:
            Q_EK, R_KD = torch.linalg.qr(weight_ED)
            A_rD, B_Er = R_KD[:r], Q_EK[:, :r]
        tensors[f"{site.key}.A"], tensors[f"{site.key}.B"] = A_rD.contiguous(), B_Er.contiguous()
    return tensors


METHOD = LoraMethod()
