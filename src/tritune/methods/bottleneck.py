"""Bottleneck adapters: a small two-layer network put into each layer of the frozen base.

A(u) = s (W_up f(W_down u + b_down) + b_up), added to what a sub-layer adds to the residual stream. Where it sits:

    seq          after the feed-forward, on the whole stream:  y + A(x + y)   (Pfeiffer et al. 2021, arXiv:2005.00247)
    double_seq   after both sub-layers, on their output:       y + A(y)       (Houlsby et al. 2019, arXiv:1902.00751)
    par          beside the feed-forward, on its input stream: y + A(x)       (He et al. 2022, arXiv:2110.04366)

x is the residual stream entering the sub-layer before its norm, y the sub-layer's output: adapter-hub's meaning on
pre-norm decoders (seq_bn, double_seq_bn, par_bn). Shapes: N packed tokens, D model width, R bottleneck width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from tritune.methods.base import Budget, Delta, Method, sites_of
from tritune.models.base import Role, Site
from tritune.models.load import Base
from tritune.spec import MethodConfig, Strategy

Placement = Literal["seq", "double_seq", "par"]
Nonlinearity = Literal["relu", "gelu", "swish", "tanh"]

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
_ROLES: Mapping[str, tuple[Role, ...]] = {
    "seq": (Role.BLOCK_MLP,),
    "double_seq": (Role.BLOCK_ATTN, Role.BLOCK_MLP),
    "par": (Role.BLOCK_MLP,),
}


class Bottleneck(MethodConfig):
    """Bottleneck adapters.

    placement: "seq" after the feed-forward, "double_seq" after attention and feed-forward, "par" beside the feed-forward.
    reduction_factor: model width / bottleneck width.
    nonlinearity: f between the two layers.
    scaling: s, a number or "learned" (one number per adapter, from 1).
    init: "zero": the up-projection starts at zero, so training starts exactly at the base; "bert": N(0, 0.02), near it.
    """

    placement: Placement = "seq"
    reduction_factor: float = Field(default=16.0, gt=0)
    nonlinearity: Nonlinearity = "relu"
    scaling: float | Literal["learned"] = 1.0
    init: Literal["zero", "bert"] = "zero"

    def sites(self, base: Base) -> tuple[Site, ...]:
        return sites_of(base, _ROLES[self.placement])

    def width(self, site: Site) -> int:
        return max(1, int(site.d_out // self.reduction_factor))


class BottleneckDelta(Delta):
    """down.weight (R, D), down.bias (R), up.weight (D, R), up.bias (D), and scaling (1) where learned, per site."""

    def __init__(self, config: Bottleneck, sites: Sequence[Site], tensors: Mapping[str, Tensor]) -> None:
        super().__init__(sites)
        self.config = config
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        u_ND = {"seq": lambda: x_ND + y_NE, "double_seq": lambda: y_NE, "par": lambda: x_ND}[self.config.placement]()
        weight = {name: self.part(site, name).to(y_NE.dtype) for name in self.parts()}
        h_NR = _FUNCTIONS[self.config.nonlinearity](F.linear(u_ND, weight["down.weight"], weight["down.bias"]))
        if self.config.scaling == 1.0:
            return torch.addmm(y_NE + weight["up.bias"], h_NR, weight["up.weight"].T)
        scaling = weight["scaling"] if self.config.scaling == "learned" else self.config.scaling
        return y_NE + scaling * F.linear(h_NR, weight["up.weight"], weight["up.bias"])

    def parts(self) -> tuple[str, ...]:
        return _parts(self.config)

    def export(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainable().items()}


def _parts(config: Bottleneck) -> tuple[str, ...]:
    always = ("down.weight", "down.bias", "up.weight", "up.bias")
    return (*always, "scaling") if config.scaling == "learned" else always


class BottleneckMethod(Method[Bottleneck]):
    kind = "bottleneck"
    strategy = Strategy.ADAPTERS
    Config = Bottleneck
    summary = "small two-layer networks inside the frozen base"
    learning_rate = 1e-3
    variants: ClassVar = (
        Bottleneck(reduction_factor=8.0),
        Bottleneck(placement="double_seq", reduction_factor=16.0, nonlinearity="swish", init="bert"),
        Bottleneck(placement="par", reduction_factor=4.0, nonlinearity="gelu", scaling="learned"),
        Bottleneck(placement="par", reduction_factor=10.0, nonlinearity="tanh", scaling=4.0),
    )

    def budget(self, config: Bottleneck, base: Base) -> Budget:
        sites = config.sites(base)
        n = sum(math.prod(shape) for shape in self.shapes(config, base).values())
        flops = sum(2 * 2 * site.d_out * config.width(site) for site in sites)
        return Budget(trained=n, stored=n, stored_bytes=4 * n, added_flops=flops)

    def identity_at_start(self, config: Bottleneck) -> bool:
        return config.init == "zero"

    def shapes(self, config: Bottleneck, base: Base) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for site in config.sites(base):
            D, R = site.d_out, config.width(site)
            all_parts = {
                "down.weight": (R, D),
                "down.bias": (R,),
                "up.weight": (D, R),
                "up.bias": (D,),
                "scaling": (1,),
            }
            shapes |= {f"{site.key}.{part}": all_parts[part] for part in _parts(config)}
        return shapes

    def init(self, config: Bottleneck, base: Base, rng: torch.Generator) -> Delta:
        tensors = {}
        for name, shape in self.shapes(config, base).items():
            tensors[name] = _start(config, name, shape, rng).to(base.device)
        return BottleneckDelta(config, config.sites(base), tensors)

    def _load(self, config: Bottleneck, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return BottleneckDelta(config, config.sites(base), {n: t.to(base.device) for n, t in tensors.items()})


def _start(config: Bottleneck, name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    if name.endswith("scaling"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if config.init == "bert":
        return torch.empty(shape).normal_(0, 0.02, generator=rng)
    if name.endswith("up.weight"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])  # kaiming-uniform with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)


METHOD = BottleneckMethod()
