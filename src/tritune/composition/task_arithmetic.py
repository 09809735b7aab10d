"""How several changes of one matrix become one: TIES (Yadav et al. 2023, arXiv:2306.01708), DARE (Yu et al. 2024,
arXiv:2311.03099), and the nearest matrix of low rank. Tensors alone: knows no adaptation and no base.

Each works on the change itself, B A with its scale, never on A and B apart: a combination of the factors is no combination of
the changes (its product has every B with every other A).
Shapes: S changes, D and E input and output width, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted(changes_SED: Tensor, weights: Sequence[float]) -> Tensor:
    """The sum of all, each times its weight."""
    return (_column(changes_SED, weights) * changes_SED).sum(0)


def largest(changes_SED: Tensor, density: float) -> Tensor:
    """Each change with this share of its numbers, the largest in size, and zeros for the rest (TIES: trim)."""
    flat_SN = changes_SED.flatten(1)
    kept = flat_SN.abs().topk(max(1, int(density * flat_SN.shape[1])), dim=1).indices
    mask_SN = torch.zeros_like(flat_SN).scatter_(1, kept, 1.0)
    return (flat_SN * mask_SN).view_as(changes_SED)


def dropped(changes_SED: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """Each change with this share of its numbers, drawn at random and enlarged by 1 / density (DARE: drop and rescale)."""
    kept = (
        torch.rand(changes_SED.shape, generator=rng, dtype=torch.float64) < density
    )  # on the CPU: the same everywhere
    return changes_SED * kept.to(changes_SED) / density


def agreed(changes_SED: Tensor, weights: Sequence[float]) -> Tensor:
    """Per number the mean of the weighted values that have the sign of the sum of all (TIES: elect, disjoint merge)."""
    total_ED = changes_SED.sum(0)
    sign_ED = torch.where(total_ED >= 0, 1.0, -1.0).to(total_ED)
    agrees_SED = changes_SED.sign() == sign_ED
    sum_ED = (_column(changes_SED, weights) * changes_SED * agrees_SED).sum(0)
    return sum_ED / agrees_SED.sum(0).clamp(min=1)


def _column(changes_SED: Tensor, weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights, dtype=changes_SED.dtype, device=changes_SED.device)[:, None, None]


def nearest(change_ED: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, D) and B (E, r) whose product is the nearest of this rank, in the sum of squares (Eckart and Young)."""
    U_EK, S_K, V_KD = torch.linalg.svd(change_ED, full_matrices=False)
    root_r = S_K[:rank].sqrt()
    return (root_r[:, None] * V_KD[:rank]).contiguous(), (U_EK[:, :rank] * root_r).contiguous()
