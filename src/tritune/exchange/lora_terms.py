"""A LoRA of ours as low-rank terms on sites, and terms from elsewhere as one LoRA of ours.

Ours has one rank and one scale for all sites. Coming in, terms of other ranks are padded with zeros, other scales are
multiplied into B, and layers that have none get zeros: the same function, and said. Shapes: r rank, e output width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.exchange.format import Incoming
from tritune.exchange.modules import LowRank
from tritune.methods.base import linear_roles
from tritune.methods.lora import LoRA
from tritune.models.base import LINEAR_ROLES
from tritune.models.load import Base


def terms_of(adaptation: Adaptation) -> dict[str, LowRank]:
    """The term of every adapted site, by key. All have the config's own scale: what a role has of its own goes into B."""
    given, tensors = adaptation.config, adaptation.delta.export()
    assert isinstance(given, LoRA)
    terms = {}
    for site in adaptation.delta.sites():
        A_rD, B_Er, own = tensors[f"{site.key}.A"].cpu(), tensors[f"{site.key}.B"].cpu(), given.scale_at(site)
        terms[site.key] = LowRank(A_rD, B_Er if own == given.scale else B_Er * (own / given.scale), given.scale)
    return terms


def gathered(terms: Mapping[str, LowRank], base: Base, *, stabilised: bool, dropout: float = 0.0) -> Incoming:
    """Terms of sites as one LoRA of ours: one rank, one scale, every site of its roles.

    The scale kept is that of the first term of the largest rank.
    """
    rank = max(term.rank for term in terms.values())
    scale = next(term.scale for term in terms.values() if term.rank == rank)
    present = {site.role for site in base.sites if site.key in terms}
    roles = tuple(role for role in LINEAR_ROLES if role in present)
    sites = [site for site in base.sites if site.role in roles]
    tensors: dict[str, Tensor] = {}
    for site in sites:
        term = terms.get(site.key, LowRank(torch.zeros(0, site.d_in), torch.zeros(site.d_out, 0), scale))
        B_er = term.B if _alike(term.scale, scale) else term.B * (term.scale / scale)
        more = rank - term.rank
        tensors[f"{site.key}.A"] = torch.nn.functional.pad(term.A, (0, 0, 0, more)).contiguous()
        tensors[f"{site.key}.B"] = torch.nn.functional.pad(B_er, (0, more)).contiguous()
    config = LoRA(
        rank=rank,
        alpha=float(alpha_of(scale, rank, stabilised, digits=12)),
        rank_stabilised=stabilised,
        dropout=dropout,
        roles=None if roles == linear_roles(base) else roles,
    )
    return Incoming(config, tensors, tuple(_notes(terms, len(sites), rank, scale)))


def _notes(terms: Mapping[str, LowRank], sites: int, rank: int, scale: float) -> Iterator[str]:
    if smaller := sum(term.rank < rank for term in terms.values()):
        yield f"{smaller} terms of smaller rank were filled with zeros to rank {rank}"
    if other := sum(not _alike(term.scale, scale) for term in terms.values()):
        yield f"{other} terms of another scale than {scale:g} had theirs multiplied into B"
    if sites > len(terms):
        yield f"{sites - len(terms)} places that the file leaves alone got terms of zeros"


def _alike(a: float, b: float) -> bool:
    """The same number but for the rounding of a root and back."""
    return math.isclose(a, b, rel_tol=1e-11)


def alpha_of(scale: float, rank: int, stabilised: bool, digits: int = 15) -> float | int:
    """The alpha that gives a rank this scale, to so many digits; whole numbers as such."""
    alpha = float(f"{scale * (math.sqrt(rank) if stabilised else rank):.{digits}g}")
    return int(alpha) if alpha.is_integer() else alpha
