"""Several LoRAs of one base become one ordinary LoRA, by arithmetic on what each adds to the weights.

    linear       the weighted sum, exact: the terms lie side by side, and ranks add up (PEFT's `cat`)
    svd          the weighted sum in a given rank, the nearest there is; how far it is off is told
    ties         trim to the largest numbers, elect signs, mean of those that agree (arXiv:2306.01708); then as svd
    dare_linear  drop numbers at random, enlarge the others, weighted sum (arXiv:2311.03099); then as svd
    dare_ties    drop and enlarge, then elect and mean as ties does

As PEFT's `add_weighted_adapter` where that acts on the changes themselves (`cat`, `svd`, `ties_svd`, ...); every scale,
rank-stabilised or not, counts once. Trimming is per place, as there; the paper trims over all weights at once.
Whether something is a LoRA is asked of what it does: low-rank terms at linear maps and nothing else.
Shapes: S parts, r rank, D and E input and output width of a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.composition import task_arithmetic
from tritune.composition.parts import hint, origin_of, problems_of
from tritune.errors import Mismatch, Problem
from tritune.exchange.lora_terms import gathered
from tritune.exchange.modules import LowRank
from tritune.methods import method_of
from tritune.models.base import Site
from tritune.models.dtype import at_least_float32
from tritune.spec import MethodConfig, Scope
from tritune.tasks.base import Task

How = Literal["linear", "svd", "ties", "dare_linear", "dare_ties"]
HOWS: tuple[How, ...] = get_args(How)
#: ways that take a mean of their own, so that weights are one by default; else their default is one by the number of parts
MEANS = ("ties", "dare_ties")


@dataclass(frozen=True, slots=True)
class Merged:
    """The merged adaptation, and what its rank cost: distance to the full result as a share of that, in the sum of squares
    over all places, and at the worst one. Exactly zero for "linear"."""

    adaptation: Adaptation
    error: float
    worst: float


def merge(
    parts: Sequence[Adaptation],
    how: How = "linear",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    task: Task | None = None,
) -> Merged:
    """One LoRA from several.

    Args:
        parts: adaptations of one base that are low-rank terms and nothing else; stacks of them too.
        weights: one per part; None: the average.
        rank: of the result, not for "linear"; None: at each place the largest of the parts.
        density: share of numbers that "ties", "dare_linear" and "dare_ties" keep.
        seed: of what "dare_linear" and "dare_ties" draw.
        task: what the answers mean, where the parts' tasks differ; None: they all have the same.

    Raises:
        Mismatch: with every reason why these cannot be merged so.
    """
    problems = [
        *problems_of(parts, task),
        *(problem for i, part in enumerate(parts, 1) for problem in _no_terms(part, f"part {i} ({part.method.kind})")),
        *wrong_options(how, len(parts), weights, rank, density),
    ]
    Mismatch.check("These adaptations cannot be merged.", problems, hint(problems))
    chosen = list(weights or [1.0 if how in MEANS else 1 / len(parts)] * len(parts))
    base = parts[0].base
    rng = torch.Generator().manual_seed(seed)
    terms: dict[str, LowRank] = {}
    squares: list[tuple[float, float]] = []
    for site in base.sites:
        own = [(part.delta.low_rank(site), w) for part, w in zip(parts, chosen, strict=True) if _acts(part, site)]
        there = [(_plain(term.A_rD, term.B_Er, term.scale), w) for term, w in own if term is not None]
        if not there:
            continue
        if how == "linear":
            terms[site.key] = _side_by_side(there)
        else:
            full_ED = _combined(how, there, density or 1.0, rng)
            A, B = task_arithmetic.nearest(full_ED, min(rank or max(t.rank for t, _ in there), *full_ED.shape))
            terms[site.key] = LowRank(A.float().cpu(), B.float().cpu(), 1.0)
            squares.append((float((full_ED - B @ A).square().sum()), float(full_ED.square().sum())))
    incoming = gathered(terms, base, stabilised=False)
    options = {"weights": chosen, "rank": rank, "density": density, "seed": seed}
    merged = Adaptation(
        base, task or parts[0].task, incoming.config, incoming.tensors, origin_of(f"merged, {how}", parts, **options)
    )
    return Merged(merged, _share([*map(sum, zip(*squares, strict=True))]), max(map(_share, squares), default=0.0))


def _acts(part: Adaptation, site: Site) -> bool:
    return any(own.key == site.key for own in part.delta.sites())


def _no_terms(part: Adaptation, where: str) -> Iterator[Problem]:
    """Why an adaptation is more, or other, than low-rank terms."""
    if part.delta.weights():
        yield Problem(where, "replaces weights of the base")
    if part.delta.segments():
        yield Problem(where, "has virtual tokens: they are input, and add to no weight")
    more = [site.key for site in part.delta.sites() if part.delta.low_rank(site) is None]
    if more:
        yield Problem(where, f"does more at {len(more)} places than add a low-rank term ({more[0]}, ...)")


def not_low_rank(configs: Sequence[MethodConfig]) -> Iterator[Problem]:
    """Adaptations that are no sum of low-rank terms, as far as their settings tell: nothing is loaded yet."""
    for i, config in enumerate(configs, 1):
        its = method_of(config)
        reason = "replaces weights of the base" if its.scope is Scope.BASE else its.unmergeable(config)
        if reason:
            yield Problem(f"part {i} ({its.kind})", reason)


def wrong_options(
    how: str, n: int, weights: Sequence[float] | None, rank: int | None, density: float | None
) -> Iterator[Problem]:
    """Options that do not fit the way."""
    if how not in HOWS:
        yield Problem("how", f"'{how}'; known: {', '.join(HOWS)}")
    if weights is not None and len(weights) != n:
        yield Problem("weights", f"{len(weights)} for {n} parts")
    if weights is not None and not all(map(math.isfinite, weights)):
        yield Problem("weights", "not all are finite")
    if how in MEANS and any(w < 0 for w in weights or ()):
        yield Problem(
            "weights", f"one is negative; {how} elects signs before it weighs, and that one would count for others'"
        )
    if rank is not None and how == "linear":
        yield Problem("rank", "linear keeps every rank and is exact; 'svd' is the same in a given rank")
    if rank is not None and rank < 1:
        yield Problem("rank", "is not at least 1")
    sparse = how in HOWS and how not in ("linear", "svd")
    if sparse != (density is not None):
        yield Problem("density", f"{how} needs it" if sparse else f"is not for {how}, which keeps everything")
    elif density is not None and not 0 < density <= 1:
        yield Problem("density", f"{density} is not above 0 and at most 1")


def _plain(A_rD: Tensor, B_Er: Tensor, scale: float) -> LowRank:
    return LowRank(at_least_float32(A_rD.detach()), at_least_float32(B_Er.detach()), scale)


def _side_by_side(there: Sequence[tuple[LowRank, float]]) -> LowRank:
    """B A is the weighted sum of the parts' s B A."""
    B = torch.cat([w * term.scale * term.B for term, w in there], 1)
    return LowRank(torch.cat([term.A for term, _ in there]).cpu(), B.cpu(), 1.0)


def _combined(how: str, there: Sequence[tuple[LowRank, float]], density: float, rng: torch.Generator) -> Tensor:
    changes_SED = torch.stack([term.scale * (term.B.double() @ term.A.double()) for term, _ in there])
    weights = [w for _, w in there]
    ways: Mapping[str, Callable[[], Tensor]] = {
        "svd": lambda: task_arithmetic.weighted(changes_SED, weights),
        "ties": lambda: task_arithmetic.agreed(task_arithmetic.largest(changes_SED, density), weights),
        "dare_linear": lambda: task_arithmetic.weighted(task_arithmetic.dropped(changes_SED, density, rng), weights),
        "dare_ties": lambda: task_arithmetic.agreed(task_arithmetic.dropped(changes_SED, density, rng), weights),
    }
    return ways[how]()


def _share(squares: Sequence[float]) -> float:
    """Distance as a share, from its square and that of the whole."""
    if not squares or not squares[1]:
        return 0.0
    return math.sqrt(squares[0] / squares[1])
