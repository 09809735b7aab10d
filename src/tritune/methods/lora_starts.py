"""What LoRA's A and B are before training: at random and zero, or taken from the base's own matrices.

Knows configs and matrices, no optimizer. Shapes: r rank, D and E input and output width of a site, K the smaller of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritune.models.base import Role, Site
from tritune.models.dtype import at_least_float32
from tritune.models.pretrained import Base

if TYPE_CHECKING:
    from tritune.methods.lora import LoRA


def at_random(config: LoRA, sites: Sequence[Site], rng: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """One of the two at zero. A kaiming-uniform with a = sqrt(5), as in the reference code, and B at zero; at the embedding
    A at zero, and B normal, so that every token's column of A learns from the first step on."""
    tensors = {}
    for name in "AB":
        for site in sites:
            r = config.rank_at(site)
            values = torch.zeros((r, site.d_in) if name == "A" else (site.d_out, r))
            if site.role is Role.EMBED:
                values = values.normal_(generator=rng) if name == "B" else values
            elif name == "A":
                bound = 1 / math.sqrt(site.d_in)
                values.uniform_(-bound, bound, generator=rng)
            tensors[f"{site.key}.{name}"] = values.to(device)
    return tensors


def from_weights(config: LoRA, base: Base, sites: Sequence[Site]) -> dict[str, Tensor]:
    """A and B whose scaled product is the part of each site's matrix that PiSSA or OLoRA takes out of it."""
    tensors = {}
    for site in sites:
        weight_ED = at_least_float32(base.matrix_of(site).own_ED())
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
