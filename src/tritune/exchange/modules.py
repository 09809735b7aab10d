"""Sites and the modules of transformers that they are part of: other packages name modules, we name sites.

A fused module (GPT-2's c_attn) serves several sites, each with some of its outputs. Knows a base, no format.
Shapes: r rank, D and E input and output width of a module, e output width of a site.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tritune.models.base import LINEAR_ROLES, Role, Site
from tritune.models.matrix import SiteMatrix
from tritune.models.pretrained import Base
from tritune.models.quantised import QuantisedLinear
from tritune.models.sites import FAMILIES, is_transposed, sizes


@dataclass(frozen=True, slots=True, eq=False)
class LinearModule:
    """A linear module of the base.

    Attributes:
        path: its name in the model ("model.layers.0.self_attn.q_proj").
        within: its name in its layer ("self_attn.q_proj"), the same in every layer.
        layer: number of its layer.
        sites: what it serves, and which outputs each site has; None: all of them.
        d_in, d_out: D and E.
        transposed: whether it keeps its weight as [in, out] (GPT-2's Conv1D).
        matrix: its own weight, as a matrix [out, in] in every family.
    """

    path: str
    within: str
    layer: int
    sites: tuple[tuple[Site, Tensor | None], ...]
    d_in: int
    d_out: int
    transposed: bool
    matrix: SiteMatrix

    @property
    def looked_up(self) -> bool:
        """Whether it is the embedding: its D are tokens."""
        return self.sites[0][0].role is Role.EMBED

    def norms_E(self) -> Tensor:
        """The length of every output's row of the weight."""
        return self.matrix.squared_norms_E.sqrt().cpu()

    def rows_of(self, columns: Tensor | None) -> Tensor:
        """The outputs (e) of a site, as indexes into E."""
        return torch.arange(self.d_out) if columns is None else columns.cpu()


def linear_modules(base: Base, roles: Collection[Role] = LINEAR_ROLES) -> dict[str, LinearModule]:
    """Every linear module (or the embedding, the head) that has a site of these roles, by path, in the order of the base."""
    names = {module: name for name, module in base.model.named_modules()}
    layers = FAMILIES[base.config.model_type](base.config).layers
    found: dict[str, LinearModule] = {}
    for place in base.places:
        if place.site.role in roles:
            path = names[place.module]
            before = found[path].sites if path in found else ()
            d_in, d_out = sizes(place.module)
            found[path] = LinearModule(
                path=path,
                within=path.removeprefix(f"{layers}.{place.site.layer}."),
                layer=place.site.layer,
                sites=(*before, (place.site, place.columns)),
                d_in=d_in,
                d_out=d_out,
                transposed=is_transposed(place.module) and not isinstance(place.module, nn.Embedding),
                matrix=replace(base.matrix_of(place.site), rows=replace(base.weight_of(place.site)[1], columns=None)),
            )
    return found


def weighted_modules(base: Base) -> list[str]:
    """Names of all modules that have a weight; quantised ones count, though they show none."""
    return [
        name
        for name, module in base.model.named_modules()
        if isinstance(module, QuantisedLinear) or getattr(module, "weight", None) is not None
    ]


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank term `scale * B @ A` on one module or site: A (r, D), B (E, r). With DoRA, m (E) is the length that the rows
    of its sum with the base's matrix are brought to."""

    A: Tensor
    B: Tensor
    scale: float
    m: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def has_scale(self, scale: float) -> bool:
        """The same number but for the rounding of a root and back."""
        return math.isclose(self.scale, scale, rel_tol=1e-11)

    def as_of(self, rank: int, scale: float) -> LowRank:
        """The same term with this scale (the rest goes into B) and this rank (at least its own; filled with zeros)."""
        B_Er = self.B if self.has_scale(scale) else self.B * (self.scale / scale)
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return LowRank(pad(self.A, (0, 0, 0, more)), pad(B_Er, (0, more)), scale, self.m)


def fuse(module: LinearModule, terms: Mapping[str, LowRank], *, shared: bool) -> LowRank:
    """One term for a whole module from those of its sites (by key): the same function. Its scale is the first one's.

    Args:
        shared: all have the same A, and so the module's term has their rank; else the As lie above each other and the
            Bs block by block, and the rank is the sum. Outputs that no site has keep the length that they have in the base.
    """
    present = [(terms[site.key], module.rows_of(columns)) for site, columns in module.sites if site.key in terms]
    first = present[0][0]
    if len(module.sites) == 1:
        return first
    B_Er = torch.zeros(module.d_out, first.rank if shared else sum(term.rank for term, _ in present))
    m_E = None if first.m is None else module.norms_E()
    at = 0
    for term, rows in present:
        if m_E is not None and term.m is not None:
            m_E[rows] = term.m
        B_Er[rows, at : at + term.rank] = term.as_of(term.rank, first.scale).B
        at += 0 if shared else term.rank
    return LowRank(first.A if shared else torch.cat([term.A for term, _ in present]), B_Er, first.scale, m_E)


def split(module: LinearModule, term: LowRank) -> dict[str, LowRank]:
    """The terms of a module's sites, by key: the inverse of `fuse`. A site whose outputs the term never touches has none.

    Where the term has the form that `fuse` gives, every site gets its own block back; else each gets all of A.
    """
    if len(module.sites) == 1:
        return {module.sites[0][0].key: term}
    parts = {site.key: module.rows_of(columns) for site, columns in module.sites}
    parts = {key: rows for key, rows in parts.items() if _touched(module, term, rows)} or parts
    B_er = {key: term.B[rows] for key, rows in parts.items()}
    m = {key: None if term.m is None else term.m[rows] for key, rows in parts.items()}
    for starts in _possible_starts(list(B_er.values()), term.rank):
        blocks = dict(zip(parts, zip(starts, [*starts[1:], term.rank], strict=True), strict=True))
        if all(_only_in(B_er[key], start, end) for key, (start, end) in blocks.items()):
            return {
                key: LowRank(term.A[start:end].clone(), B_er[key][:, start:end].clone(), term.scale, m[key])
                for key, (start, end) in blocks.items()
            }
    return {key: LowRank(term.A.clone(), B_er[key], term.scale, m[key]) for key in parts}


def _touched(module: LinearModule, term: LowRank, rows: Tensor) -> bool:
    """Whether the term does anything to these outputs. A length that is the base's own but for rounding is no change."""
    moved = term.m is not None and not torch.allclose(
        term.m[rows], module.norms_E()[rows].to(term.m), rtol=1e-5, atol=0
    )
    return moved or bool(term.B[rows].any())


def _possible_starts(parts: list[Tensor], rank: int) -> Iterator[list[int]]:
    """Where each site's block may begin: blocks of one width, or each where its first column is that is not zero."""
    if rank % len(parts) == 0:
        yield list(range(0, rank, rank // len(parts)))
    firsts = [int(B_er.any(dim=0).nonzero()[0]) if bool(B_er.any()) else 0 for B_er in parts]
    if firsts == sorted({*firsts}):
        yield [0, *firsts[1:]]


def _only_in(B_er: Tensor, start: int, end: int) -> bool:
    """Whether nothing outside these columns counts."""
    outside = B_er.clone()
    outside[:, start:end] = 0
    return not bool(outside.any())
