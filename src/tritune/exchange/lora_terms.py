"""A LoRA of ours as low-rank terms on sites, and terms from elsewhere as one LoRA of ours.

Ours has one rank and one scale per role, in all layers or in the last few. Coming in, terms of other ranks than the largest
of their role are padded with zeros, other scales are multiplied into B, and layers that have none get zeros, but for those
below all that have some: the same function, and said.
Shapes: r rank, e output width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Problem
from tritune.exchange.format import Incoming
from tritune.exchange.modules import LowRank
from tritune.methods.base import linear_roles, sites_of
from tritune.methods.lora import LoRA
from tritune.models.base import END_ROLES, LINEAR_ROLES, Role, Site
from tritune.models.pretrained import Base

T = TypeVar("T")


def terms_of(adaptation: Adaptation) -> dict[str, LowRank]:
    """The term of every adapted site, by key, each with the rank and the scale of its role."""
    given, tensors = adaptation.config, {name: t.cpu() for name, t in adaptation.delta.export().items()}
    assert isinstance(given, LoRA)
    return {
        site.key: LowRank(
            tensors[f"{site.key}.A"], tensors[f"{site.key}.B"], given.scale_at(site), tensors.get(f"{site.key}.m")
        )
        for site in adaptation.delta.sites()
    }


def plain_problems(adaptation: Adaptation) -> list[Problem]:
    """What formats that hold nothing but terms on linear maps of the layers cannot say."""
    given = adaptation.config
    assert isinstance(given, LoRA)
    found = [Problem("dora", "has no place there: rows of learned length are no low-rank term")] if given.dora else []
    return found + [
        Problem(f"role '{site.role}'", "has no place there, only linear maps of the layers have")
        for site in adaptation.delta.sites()
        if site.role in END_ROLES
    ]


def uniform(terms: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The same terms with one rank and one scale, for formats that have no other."""
    rank, scale = largest(terms.values())
    return {key: term.as_of(rank, scale) for key, term in terms.items()}


def largest(terms: Iterable[LowRank]) -> tuple[int, float]:
    """The largest rank, and the scale of the first term that has it."""
    first = max(terms, key=lambda term: term.rank)
    return first.rank, first.scale


def gathered(terms: Mapping[str, LowRank], base: Base, *, stabilised: bool, dropout: float = 0.0) -> Incoming:
    """Terms of sites as one LoRA of ours: every site of its roles down to the first layer, one rank and scale per role."""
    by_role: dict[Role, list[LowRank]] = {}
    for site in base.sites:
        if site.key in terms:
            by_role.setdefault(site.role, []).append(terms[site.key])
    roles = tuple(role for role in (*LINEAR_ROLES, *END_ROLES) if role in by_role)
    dora = any(term.m is not None for term in terms.values())
    own = {role: largest(by_role[role]) for role in roles}
    top_layers = reaching(terms, base)
    sites = list(sites_of(base, roles, top_layers))
    tensors: dict[str, Tensor] = {}
    for site in sites:
        rank, scale = own[site.role]
        as_it_is = base.matrix_of(site).squared_norms_E.sqrt().cpu() if dora else None
        nothing = LowRank(torch.zeros(0, site.d_in), torch.zeros(site.d_out, 0), scale, as_it_is)
        term = terms.get(site.key, nothing).as_of(rank, scale)
        if term.m is not None:
            tensors[f"{site.key}.m"] = term.m.contiguous()
        tensors[f"{site.key}.A"], tensors[f"{site.key}.B"] = term.A.contiguous(), term.B.contiguous()
    ranks = {role: rank for role, (rank, _) in own.items()}
    alphas = {role: float(alpha_of(scale, rank, stabilised, digits=12)) for role, (rank, scale) in own.items()}
    rank, alpha = _most(ranks.values()), _most(alphas.values())
    config = LoRA(
        rank=rank,
        alpha=alpha,
        rank_stabilised=stabilised,
        dropout=dropout,
        roles=None if roles == linear_roles(base) else roles,
        top_layers=top_layers,
        ranks={role: its for role, its in ranks.items() if its != rank},
        alphas={role: its for role, its in alphas.items() if its != alpha},
        dora=dora,
    )
    return Incoming(config, tensors, tuple(_notes(terms, sites, own)))


def reaching(keys: Collection[str], base: Base) -> int | None:
    """In how many of the last layers these sites are; None: down to the first layer, or in none."""
    first = min((site.layer for site in base.sites if site.key in keys and site.role not in END_ROLES), default=0)
    return base.cache_shape[0] - first if first else None


def _most(values: Iterable[T]) -> T:
    """The one seen most often, the first of several."""
    return Counter(values).most_common(1)[0][0]


def _notes(terms: Mapping[str, LowRank], sites: list[Site], own: Mapping[Role, tuple[int, float]]) -> Iterator[str]:
    there = [(terms[site.key], *own[site.role]) for site in sites if site.key in terms]
    if smaller := sum(term.rank < rank for term, rank, _ in there):
        yield f"{smaller} terms of smaller rank than others of their role were filled with zeros"
    if other := sum(not term.has_scale(scale) for term, _, scale in there):
        yield f"{other} terms of another scale than others of their role had theirs multiplied into B"
    if len(sites) > len(terms):
        yield f"{len(sites) - len(terms)} places that the file leaves alone got terms of zeros"


def alpha_of(scale: float, rank: int, stabilised: bool, digits: int = 15) -> float | int:
    """The alpha that gives a rank this scale, to so many digits; whole numbers as such."""
    alpha = float(f"{scale * (math.sqrt(rank) if stabilised else rank):.{digits}g}")
    return int(alpha) if alpha.is_integer() else alpha
