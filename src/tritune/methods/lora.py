"""LoRA: a low-rank term beside each linear map, y = Wx + s B A x (Hu et al. 2021, arXiv:2106.09685, eq. 3).

With rank-stabilised scaling s = alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732), else alpha / r.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Büyükakyüz 2024, arXiv:2406.01775) start from a part of W itself and
take that part out of the base: y = (W - s B0 A0) x + s B A x. Here the base stays as it is and the term is s (B A - B0 A0):
a term of rank 2 r, which is what is exported, as PEFT converts its own. Over a bf16 base both parts are rounded.

DoRA (`dora.py`) brings every output's row of W + s B A to a learned length. At the embedding x is the one-hot token: A's
columns are looked up, and nothing is dropped out.
Shapes: r rank, D and E input and output width of a site, N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tritune.errors import Mismatch, NotMergeable, Problem
from tritune.methods import dora
from tritune.methods import lora_starts as starts
from tritune.methods.base import Budget, Delta, Method, linear_roles, sites_of
from tritune.models.base import END_ROLES, LINEAR_ROLES, LowRank, Role, Site
from tritune.models.dtype import at_least_float32
from tritune.models.matrix import SiteMatrix, squared_norms
from tritune.models.pretrained import Base
from tritune.models.sites import Rows
from tritune.spec import MethodConfig, Strategy


class LoRA(MethodConfig):
    """Low-rank adaptation.

    rank: r, width of the learned term.
    alpha: its weight; the term is multiplied by alpha / rank.
    rank_stabilised: multiply by alpha / sqrt(rank) instead, so that large ranks learn as fast as small ones.
    dropout: share of the inputs of A set to zero while training.
    roles: roles to adapt ("attn.q", "mlp.down", ...); null: all linear maps of the layers. The embedding ("embed") and the
        output head ("head") take part only where they are named.
    top_layers: of the layers only the last so many; null: all. What the others make of a text is computed once.
    ranks, alphas: rank and alpha of single roles, {"mlp.down": 16}, where they differ.
    start: "zero": B at zero, A at random; "pissa": the largest singular values of W; "olora": the first columns of its QR
        decomposition. The adapted base starts as the bare one in each.
    dora: learn the length of every output's row of the matrix apart from its direction (weight-decomposed adaptation).
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    rank_stabilised: bool = False
    dropout: float = Field(default=0.0, ge=0, lt=1)
    roles: tuple[Role, ...] | None = None
    top_layers: int | None = Field(default=None, ge=1)
    ranks: Mapping[Role, Annotated[int, Field(ge=1)]] = {}
    alphas: Mapping[Role, Annotated[float, Field(gt=0)]] = {}
    start: Literal["zero", "pissa", "olora"] = "zero"
    dora: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is learned at a site."""
        return ("A", "B", "m") if self.dora else ("A", "B")

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
            Mismatch: roles or layers that the base lacks, roles that are not adapted or have no matrix where one is needed,
                or ranks above what a start can fill.
        """
        sites = sites_of(base, linear_roles(base) if self.roles is None else self.roles, self.top_layers)
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
        if self.dora or self.start != "zero":
            whole = sorted(role for role in adapted if role not in (*LINEAR_ROLES, *END_ROLES))
            problems += [Problem(f"role '{role}'", "is a whole sub-layer, with no matrix of its own") for role in whole]
        Mismatch.check(f"LoRA cannot be set up so on {base.name}.", problems)
        return sites


class LoraDelta(Delta):
    """A (r, D) and B (E, r) per site, with DoRA m (E) too.

    Args:
        start: the A and B that training began with, where they were taken from the base: their product is subtracted.
        matrices: the base's own, by site; DoRA needs them.
    """

    def __init__(
        self,
        config: LoRA,
        sites: Sequence[Site],
        tensors: Mapping[str, Tensor],
        start: Mapping[str, Tensor] | None = None,
        matrices: Mapping[str, SiteMatrix] | None = None,
    ) -> None:
        super().__init__(sites)
        self.config = config
        self._matrices = matrices or {}  # in a plain dict, so that nothing of the base is taken for a part of this
        self._held: dict[str, Tensor] = {}
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
        scale = self.config.scale_at(site)
        A_rD, B_Er = (self.part(site, name).to(y_NE.dtype) for name in "AB")
        if site.role is Role.EMBED:
            sum_NE = torch.addmm(y_NE, F.embedding(x_ND, A_rD.T), B_Er.T, alpha=scale)
            return self._lengthened(site, sum_NE)
        dropped_ND = F.dropout(
            x_ND.to(y_NE.dtype), self.config.dropout, self.training
        )  # the head's y is fp32 over bf16
        if not self.config.dora or not (self.training and self.config.dropout):
            added: Tensor = _LowRank.apply(dropped_ND, y_NE, A_rD, B_Er, scale)  # type: ignore[no-untyped-call]
            return self._lengthened(site, added)
        # What DoRA adds to W x + b is all of the dropped-out input: (m/c - 1) W x + m/c s B A x.
        base_NE = F.linear(dropped_ND, self._matrices[site.key].own_ED().to(y_NE.dtype))
        added = _LowRank.apply(dropped_ND, base_NE, A_rD, B_Er, scale)  # type: ignore[no-untyped-call]
        return (added * self.factor(site) + y_NE - base_NE).to(y_NE.dtype)

    def _lengthened(self, site: Site, sum_NE: Tensor) -> Tensor:
        if not self.config.dora:
            return sum_NE
        return dora.lengthened(self._matrices[site.key], sum_NE, self.factor(site))

    def factor(self, site: Site) -> Tensor:
        """DoRA's m / c (E), at least fp32; c without gradients."""
        held = self._held.get(site.key)
        return self.part(site, "m") / (self._norms(site) if held is None else held)

    def _norms(self, site: Site) -> Tensor:
        return dora.norms(
            self._matrices[site.key], self.part(site, "A"), self.part(site, "B"), self.config.scale_at(site)
        )

    @contextmanager
    def constants_held(self) -> Iterator[None]:
        self._held = {site.key: self._norms(site) for site in self.sites()} if self.config.dora else {}
        try:
            yield
        finally:
            self._held = {}

    def low_rank(self, site: Site) -> LowRank | None:
        if self.config.dora or site.role is Role.EMBED or (self.training and self.config.dropout):
            return None
        return LowRank(self.part(site, "A"), self.part(site, "B"), self.config.scale_at(site))

    def export(self) -> dict[str, Tensor]:
        return {
            f"{s.key}.{name}": self.part(s, name).detach().clone() for name in self.config.parts for s in self.sites()
        }

    def merged(self, site: Site, weight: Tensor, rows: Rows) -> Tensor:
        """A new matrix: a weight of the base with this site's part of it adapted."""
        term_ED = self.config.scale_at(site) * (self.part(site, "B") @ self.part(site, "A")).detach()
        total = rows.add_to(weight, term_ED)
        if not self.config.dora:
            return total
        length_E = squared_norms(rows.of(total)).sqrt().to(total.dtype).clamp_min(torch.finfo(total.dtype).tiny)
        return rows.scale(total, self.part(site, "m").detach() / length_E)


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
        LoRA(rank=3, dora=True, rank_stabilised=True, ranks={Role.ATTN_V: 2}),
        LoRA(rank=2, dora=True, dropout=0.2, roles=(Role.ATTN_Q, Role.MLP_DOWN), start="pissa"),
        LoRA(rank=3, alpha=4.0, roles=(Role.EMBED, Role.ATTN_Q, Role.HEAD), dropout=0.1),
        LoRA(rank=2, top_layers=2),
        LoRA(rank=2, dora=True, dropout=0.1, roles=(Role.ATTN_V, Role.MLP_UP, Role.HEAD), top_layers=1),
        LoRA(rank=2, dora=True, roles=(Role.EMBED, Role.MLP_UP, Role.HEAD), ranks={Role.HEAD: 3}),
    )

    def budget(self, config: LoRA, base: Base) -> Budget:
        sites = config.sites(base)
        lengths = sum(site.d_out for site in sites) if config.dora else 0
        trained = sum(config.rank_at(site) * (site.d_in + site.d_out) for site in sites) + lengths
        stored = sum(config.stored_rank_at(site) * (site.d_in + site.d_out) for site in sites) + lengths
        # A token's column of the embedding's A is looked up. At the head, a product is for a position that is scored.
        multiplied = [(s.d_out if s.role is Role.EMBED else s.d_in + s.d_out) * config.stored_rank_at(s) for s in sites]
        return Budget(trained=trained, stored=stored, stored_bytes=4 * stored, added_flops=2 * sum(multiplied))

    def shapes(self, config: LoRA, base: Base) -> Mapping[str, tuple[int, ...]]:
        sites = config.sites(base)
        return {
            f"{site.key}.{name}": {
                "A": (config.stored_rank_at(site), site.d_in),
                "B": (site.d_out, config.stored_rank_at(site)),
                "m": (site.d_out,),
            }[name]
            for name in config.parts
            for site in sites
        }

    def init(self, config: LoRA, base: Base, rng: torch.Generator) -> Delta:
        sites = config.sites(base)
        start = None if config.start == "zero" else starts.from_weights(config, base, sites)
        tensors = dict(start or starts.at_random(config, sites, rng, base.device))
        matrices = _matrices(config, base, sites)
        tensors |= {f"{key}.m": matrix.squared_norms_E.sqrt() for key, matrix in matrices.items()}
        return LoraDelta(config, sites, tensors, start, matrices)

    def _load(self, config: LoRA, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        sites, own = config.sites(base), {n: t.to(base.device) for n, t in tensors.items()}
        return LoraDelta(config, sites, own, matrices=_matrices(config, base, sites))

    def reads_weights(self, config: LoRA) -> bool:
        return config.dora

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        assert isinstance(delta, LoraDelta)
        ends = [site.role.value for site in delta.sites() if site.role in END_ROLES]
        if ends and base.tied:
            raise NotMergeable(
                f"The embedding and the head of {base.name} are one matrix of the base, and the term at "
                f"{' and at '.join(ends)} is not the other's: no weights of the base do the same."
            )
        merged: dict[str, Tensor] = {}
        for site in delta.sites():
            name, rows = base.weight_of(site)
            merged[name] = delta.merged(site, merged.get(name, base.parameters()[name].detach().float()), rows)
        return {name: weight.to(base.dtype) for name, weight in merged.items()}


def _matrices(config: LoRA, base: Base, sites: Sequence[Site]) -> dict[str, SiteMatrix]:
    return {site.key: base.matrix_of(site) for site in sites} if config.dora else {}


METHOD = LoraMethod()
