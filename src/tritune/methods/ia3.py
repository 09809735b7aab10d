"""(IA)^3: learned scales on what a frozen base computes (Liu et al. 2022, arXiv:2205.05638, section 3.3).

    output side    y = l * (Wx + b)    keys and values in the paper
    input side     y = W (l * x) + b   the feed-forward's inner activations, where they enter the down projection

All scales start at one, so training starts at the base; a few numbers per layer are all that is stored. Where one matrix
serves several roles (GPT-2, GPT-NeoX, Phi-3) the output side scales the outputs of its own role only.
Shapes: D and E input and output width of a site, N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tritune.errors import Mismatch, Problem
from tritune.methods.base import Budget, Delta, Method, sites_of
from tritune.models.base import LINEAR_ROLES, Role, Scales, Site
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig, Strategy


class IA3(MethodConfig):
    """Learned scales.

    output_roles: linear roles whose outputs are scaled.
    input_roles: linear roles whose inputs are scaled; not those that share a matrix, and so an input, with others.
    top_layers: of the layers only the last so many; null: all. What the others make of a text is computed once.
    """

    output_roles: tuple[Role, ...] = (Role.ATTN_K, Role.ATTN_V)
    input_roles: tuple[Role, ...] = (Role.MLP_DOWN,)
    top_layers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _linear_and_some(self) -> Self:
        roles = (*self.output_roles, *self.input_roles)
        if not roles:
            raise ValueError("give output_roles, input_roles or both: without any, nothing would be learned")
        if blocks := [role.value for role in roles if role not in LINEAR_ROLES]:
            raise ValueError(f"{', '.join(blocks)}: only the outputs and inputs of single linear maps can be scaled")
        return self

    def sites(self, base: Base) -> tuple[Site, ...]:
        """
        Raises:
            Mismatch: a role or layers that the base lacks, or a role whose input cannot be scaled for itself.
        """
        roles = [role for role in Role if role in (*self.output_roles, *self.input_roles)]
        sites = sites_of(base, roles, self.top_layers)
        fused = {site.role for site in sites if site.role in self.input_roles and base.weight_of(site)[1].fused}
        Mismatch.check(
            f"{base.name} cannot have these inputs scaled.",
            [
                Problem(f"role '{role}'", "shares its matrix, and so its input, with other roles")
                for role in sorted(fused)
            ],
            hint="Name it in output_roles instead.",
        )
        return sites


class Ia3Delta(Delta):
    """in (D) where a site's input is scaled, out (E) where its output is."""

    def __init__(self, config: IA3, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(sites)
        self.config = config
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def enter(self, site: Site, x_ND: Tensor, slot_N: Tensor | None) -> Tensor:
        if site.role not in self.config.input_roles:
            return x_ND
        return x_ND * self.part(site, "in").to(x_ND.dtype)

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        if site.role not in self.config.output_roles:
            return y_NE
        return y_NE * self.part(site, "out").to(y_NE.dtype)

    def scales(self, site: Site) -> Scales | None:
        in_D = self.part(site, "in") if site.role in self.config.input_roles else None
        return Scales(in_D, self.part(site, "out") if site.role in self.config.output_roles else None)

    def export(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainable().items()}


class Ia3Method(Method[IA3]):
    kind = "ia3"
    strategy = Strategy.ADAPTERS
    Config = IA3
    summary = "learned scales on keys, values and the feed-forward; the base is frozen"
    learning_rate = 1e-2
    variants: ClassVar = (
        IA3(),
        IA3(output_roles=(Role.ATTN_Q, Role.ATTN_V, Role.MLP_UP), input_roles=()),
        IA3(output_roles=(Role.MLP_DOWN,), input_roles=(Role.ATTN_O, Role.MLP_DOWN)),
        IA3(top_layers=2),
    )

    def budget(self, config: IA3, base: Base) -> Budget:
        n = sum(math.prod(shape) for shape in self.shapes(config, base).values())
        return Budget(trained=n, stored=n, stored_bytes=4 * n)  # element by element: no product is added

    def shapes(self, config: IA3, base: Base) -> Mapping[str, tuple[int, ...]]:
        sites = config.sites(base)
        return {f"{s.key}.in": (s.d_in,) for s in sites if s.role in config.input_roles} | {
            f"{s.key}.out": (s.d_out,) for s in sites if s.role in config.output_roles
        }

    def init(self, config: IA3, base: Base, rng: torch.Generator) -> Delta:
        ones = {name: torch.ones(shape, device=base.device) for name, shape in self.shapes(config, base).items()}
        return Ia3Delta(config, config.sites(base), ones)

    def _load(self, config: IA3, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return Ia3Delta(config, config.sites(base), {n: t.to(base.device) for n, t in tensors.items()})

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        """Rows of a matrix, and its bias, times the output scale; columns times the input scale."""
        scales = delta.export()
        own = base.parameters()
        merged: dict[str, Tensor] = {}
        for site in delta.sites():
            name, rows = base.weight_of(site)
            out_E, in_D = scales.get(f"{site.key}.out"), scales.get(f"{site.key}.in")
            merged[name] = rows.scale(merged.get(name, own[name].detach().float()), out_E, in_D)
            bias = f"{name.removesuffix('weight')}bias"
            if out_E is not None and bias in own:
                merged[bias] = rows.scale_outputs(merged.get(bias, own[bias].detach().float()), out_E)
        return {name: tensor.to(base.dtype) for name, tensor in merged.items()}


METHOD = Ia3Method()
