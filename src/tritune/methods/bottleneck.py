"""Bottleneck adapters: a small two-layer network put into each layer of the frozen base.

A(u) = s (W_up f(W_down u + b_down) + b_up), added to what a sub-layer adds to the residual stream. Where it sits:

    seq          after the feed-forward, on the whole stream:  y + A(x + y)   (Pfeiffer et al. 2021, arXiv:2005.00247)
    double_seq   after both sub-layers, on their output:       y + A(y)       (Houlsby et al. 2019, arXiv:1902.00751)
    par          beside the feed-forward, on its input stream: y + A(x)       (He et al. 2022, arXiv:2110.04366)

x is the residual stream entering the sub-layer before its norm, y the sub-layer's output. Where the base norms after the
sum (OPT-350m) "the whole stream" is LN(x + y), and the norm then sees x + y + A(LN(x + y)). The options, their names and
their meaning are adapter-hub's (adapters 1.3, `BnConfig`), so that its adapters can come in and go out unchanged.
Shapes: N packed tokens, D model width, R bottleneck width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tritune.errors import Mismatch, Problem
from tritune.methods.base import Budget, Delta, Method, first_layer, sites_of, too_many_layers
from tritune.models.base import Role, Site
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig, Strategy

Placement = Literal["seq", "double_seq", "par"]
Block = Literal["attn", "mlp"]
Preset = Literal["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn"]
Nonlinearity = Literal["relu", "leakyrelu", "gelu", "gelu_new", "swish", "tanh", "sigmoid"]

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leakyrelu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_new": lambda t: F.gelu(t, approximate="tanh"),
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
_BLOCKS: Mapping[Placement, tuple[Block, ...]] = {"seq": ("mlp",), "double_seq": ("attn", "mlp"), "par": ("mlp",)}
_ROLES: Mapping[Block, Role] = {"attn": Role.BLOCK_ATTN, "mlp": Role.BLOCK_MLP}

#: adapter-hub's configs of these names (its "mam_adapter" start is "zero" here)
_PRESETS: Mapping[str, Mapping[str, object]] = {
    "seq_bn": {"placement": "seq", "reduction_factor": 16.0, "nonlinearity": "relu", "init": "bert"},
    "double_seq_bn": {"placement": "double_seq", "reduction_factor": 16.0, "nonlinearity": "swish", "init": "bert"},
    "par_bn": {"placement": "par", "reduction_factor": 2.0, "nonlinearity": "relu", "init": "zero", "scaling": 4.0},
    "scaled_par_bn": {
        "placement": "par",
        "reduction_factor": 2.0,
        "nonlinearity": "relu",
        "init": "zero",
        "scaling": "learned",
    },
}


class Bottleneck(MethodConfig):
    """Bottleneck adapters.

    preset: settings of adapter-hub's config of this name ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn"), for
        everything that is not given beside it.
    placement: "seq" after the feed-forward, "double_seq" after attention and feed-forward, "par" beside the feed-forward.
    blocks: the sub-layers that get one, "attn", "mlp" or both; null: as the placement has it.
    reduction_factor: model width / bottleneck width; or one per layer by its number, {"0": 8.0, "default": 16.0}.
    nonlinearity: f between the two layers.
    scaling: s, a number, "learned" (one number per adapter, from 1) or "channel" (one per channel, from 1).
    dropout: share of the adapter's outputs set to zero while training.
    leave_out: layers without adapters (AdapterDrop, Rücklé et al. 2021, arXiv:2010.11918).
    top_layers: only the last so many layers get one (of them, those that leave_out does not name); null: all. What the others
        make of a text is computed once.
    init: "zero": the up-projection starts at zero, so training starts exactly at the base; near it: "bert" N(0, 0.02),
        "houlsby" N(0, 0.01) cut off at 0.02.
    original_ln_before: whether the stream is added to y (and normed, where the base norms after the sum) before the adapter
        reads it; null: as the placement has it. Not with "par".
    original_ln_after: whether the stream is added to the adapter's result (and normed, ...). Without it, the residual has
        to bring the stream.
    residual_before_ln: what the adapter's result is added to: y (true); what the adapter reads, with original_ln_before
        (false); x + y where the base norms after the sum ("post_add"). Not with "par".
    ln_before, ln_after: layer norms of the adapter's own, in front of it and behind it.
    adapter_residual_before_ln: whether ln_after norms the sum with the residual instead of A alone. Not with "par".
    """

    preset: Preset | None = None
    placement: Placement = "seq"
    blocks: tuple[Block, ...] | None = Field(default=None, min_length=1)
    reduction_factor: float | Mapping[str, float] = 16.0
    nonlinearity: Nonlinearity = "relu"
    scaling: float | Literal["learned", "channel"] = 1.0
    dropout: float = Field(default=0.0, ge=0, lt=1)
    leave_out: tuple[int, ...] = ()
    top_layers: int | None = Field(default=None, ge=1)
    init: Literal["zero", "bert", "houlsby"] = "zero"
    original_ln_before: bool | None = None
    original_ln_after: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        """An unknown preset is left to the check of the field. Arrays of JSON come in here as lists."""
        if not isinstance(data, Mapping):
            return data
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return {**_PRESETS.get(str(given.get("preset")), {}), **given}

    @field_validator("reduction_factor")
    @classmethod
    def _positive_by_layer(cls, factor: float | Mapping[str, float]) -> float | Mapping[str, float]:
        by_layer = factor if isinstance(factor, Mapping) else {"default": factor}
        if not all(value > 0 for value in by_layer.values()):
            raise ValueError("has to be greater than 0")
        if wrong := [key for key in by_layer if key != "default" and not key.isdecimal()]:
            raise ValueError(f"{', '.join(map(repr, wrong))}: keys are numbers of layers, from 0, or 'default'")
        return factor

    @model_validator(mode="after")
    def _sequential_options(self) -> Self:
        sequential = {
            "original_ln_before": self.original_ln_before is not None,
            "residual_before_ln": self.residual_before_ln is not True,
            "adapter_residual_before_ln": self.adapter_residual_before_ln,
        }
        if self.parallel and any(sequential.values()):
            given = ", ".join(name for name, is_given in sequential.items() if is_given)
            raise ValueError(f'{given}: an adapter beside the sub-layer (placement "par") has no such residual')
        if self.residual_before_ln == "post_add" and not self.reads_sum:
            raise ValueError('residual_before_ln "post_add" goes with original_ln_before')
        return self

    @property
    def parallel(self) -> bool:
        return self.placement == "par"

    @property
    def reads_sum(self) -> bool:
        """Whether the adapter reads x + y (normed, where the base norms after the sum)."""
        return self.placement == "seq" if self.original_ln_before is None else self.original_ln_before

    def sites(self, base: Base) -> tuple[Site, ...]:
        """
        Raises:
            Mismatch: layers that this base lacks, no layer left, or options that mean nothing where its norms stand.
        """
        roles = [_ROLES[block] for block in self.blocks or _BLOCKS[self.placement]]
        sites = sites_of(base, roles)
        Mismatch.check(f"These adapters do not fit {base.name}.", self._misfits(base, sites))
        first = first_layer(base, self.top_layers)
        return tuple(site for site in sites if site.layer >= first and site.layer not in self.leave_out)

    def _misfits(self, base: Base, sites: Sequence[Site]) -> list[Problem]:
        layers = sorted({site.layer for site in sites})
        named = {"leave_out": {*self.leave_out}, "reduction_factor": {*map(int, self._layers_named())}}
        found = [
            Problem(f"{option}, layer {layer}", f"the base has layers {layers[0]} to {layers[-1]}")
            for option, numbers in named.items()
            for layer in sorted(numbers - {*layers})
        ]
        found += too_many_layers(base, self.top_layers)
        reached = [layer for layer in layers if layer >= first_layer(base, self.top_layers)]
        if {*reached} <= {*self.leave_out}:
            found.append(Problem("leave_out", "leaves no layer with an adapter"))
        if isinstance(self.reduction_factor, Mapping) and "default" not in self.reduction_factor:
            missing = [str(n) for n in reached if n not in self.leave_out and str(n) not in self.reduction_factor]
            found += [Problem(f"reduction_factor, layer {n}", "has none, and there is no 'default'") for n in missing]
        after_sum = any(_norms(base, sites).values())
        if after_sum and not self.original_ln_after:
            found.append(Problem("original_ln_after", "false, but this base norms after the sum, and always does"))
        if not after_sum and self.residual_before_ln == "post_add":
            found.append(Problem("residual_before_ln", "'post_add', but this base does not norm after the sum"))
        return found

    def _layers_named(self) -> list[str]:
        return (
            [key for key in self.reduction_factor if key != "default"]
            if isinstance(self.reduction_factor, Mapping)
            else []
        )

    def width(self, site: Site) -> int:
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            factor = factor.get(str(site.layer), factor.get("default", 1.0))
        return max(1, int(site.d_out // factor))


def _norms(base: Base, sites: Sequence[Site]) -> dict[str, nn.Module | None]:
    """The norm behind each site's sum with the stream, where the base has one."""
    keys = {site.key for site in sites}
    return {place.site.key: place.norm for place in base.places if place.site.key in keys}


class BottleneckDelta(Delta):
    """Per site: down.weight (R, D), down.bias (R), up.weight (D, R), up.bias (D); where there are such, scaling (1 or D)
    and weight and bias (D) of ln_before and ln_after.

    `norms` are the base's own, by site; they are used and never changed.
    """

    def __init__(
        self,
        config: Bottleneck,
        sites: Sequence[Site],
        norms: Mapping[str, nn.Module | None],
        tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__(sites)
        self.config = config
        self._norms = dict(norms)  # a plain dict: modules of the base are no part of this one
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        part = self._cast(site, y_NE.dtype)
        u_ND, residual_ND = self.reads(site, x_ND, y_NE)
        if self._is_plain:
            return torch.addmm(y_NE + part["up.bias"], self._inner(part, u_ND), part["up.weight"].T)
        a_ND = F.dropout(self._scaled(part, u_ND), self.config.dropout, self.training)
        if self.config.adapter_residual_before_ln:
            out_ND = _own_norm(a_ND + residual_ND, part, "ln_after")
        else:
            out_ND = _own_norm(a_ND, part, "ln_after") + residual_ND
        return out_ND if self.config.original_ln_after else out_ND - x_ND  # the base adds x in any case

    def branch(self, site: Site, u_ND: Tensor) -> Tensor:
        """A(u) alone (N, D): no dropout, no norm behind it, added to nothing."""
        return self._scaled(self._cast(site, u_ND.dtype), u_ND)

    def _cast(self, site: Site, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: self.part(site, name).to(dtype) for name in _parts(self.config)}

    def _inner(self, part: Mapping[str, Tensor], u_ND: Tensor) -> Tensor:
        h_NR = F.linear(_own_norm(u_ND, part, "ln_before"), part["down.weight"], part["down.bias"])
        return _FUNCTIONS[self.config.nonlinearity](h_NR)

    def _scaled(self, part: Mapping[str, Tensor], u_ND: Tensor) -> Tensor:
        a_ND = F.linear(self._inner(part, u_ND), part["up.weight"], part["up.bias"])
        return a_ND * (part["scaling"] if isinstance(self.config.scaling, str) else self.config.scaling)

    @property
    def _is_plain(self) -> bool:
        """y + A(u) and nothing else: one fused product does it."""
        c = self.config
        return (
            c.scaling == 1.0
            and not c.dropout
            and not c.ln_after
            and c.original_ln_after
            and c.residual_before_ln is True
        )

    def reads(self, site: Site, x_ND: Tensor, y_ND: Tensor) -> tuple[Tensor, Tensor]:
        """What the adapter reads, and what its result is added to."""
        if self.config.parallel:
            return x_ND, y_ND
        if not self.config.reads_sum:
            return y_ND, y_ND
        norm = self._norms[site.key]
        sum_ND = x_ND + y_ND
        u_ND = sum_ND if norm is None else norm(sum_ND)
        return u_ND, {True: y_ND, False: u_ND, "post_add": sum_ND}[self.config.residual_before_ln]

    def export(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.trainable().items()}


def _own_norm(t_ND: Tensor, part: Mapping[str, Tensor], name: str) -> Tensor:
    """A layer norm that the adapter brings, if it brings one."""
    weight = part.get(f"{name}.weight")
    return t_ND if weight is None else F.layer_norm(t_ND, t_ND.shape[-1:], weight, part[f"{name}.bias"])


def _parts(config: Bottleneck) -> tuple[str, ...]:
    optional = {
        "scaling": isinstance(config.scaling, str),
        "ln_before.weight": config.ln_before,
        "ln_before.bias": config.ln_before,
        "ln_after.weight": config.ln_after,
        "ln_after.bias": config.ln_after,
    }
    always = ("down.weight", "down.bias", "up.weight", "up.bias")
    return (*always, *(name for name, there in optional.items() if there))


class BottleneckMethod(Method[Bottleneck]):
    kind = "bottleneck"
    strategy = Strategy.ADAPTERS
    Config = Bottleneck
    summary = "small two-layer networks inside the frozen base"
    # one pass over 1,000 reviews: 0.840 on dev, 1e-3: 0.837 (n = 844); at 3e-3 some seeds collapse
    learning_rate = 5e-4
    variants: ClassVar = (
        Bottleneck(reduction_factor=8.0),
        Bottleneck(reduction_factor=8.0, top_layers=2, leave_out=(1,)),
        Bottleneck(placement="double_seq", reduction_factor=16.0, nonlinearity="swish", init="bert"),
        Bottleneck(placement="par", reduction_factor=4.0, nonlinearity="gelu", scaling="learned"),
        Bottleneck(
            placement="par", reduction_factor=10.0, nonlinearity="tanh", scaling=4.0, ln_after=True, dropout=0.1
        ),
        Bottleneck(
            preset="double_seq_bn",
            blocks=("attn",),
            reduction_factor={"1": 4.0, "default": 16.0},
            nonlinearity="gelu_new",
            init="zero",
            scaling="channel",
            leave_out=(0,),
            ln_before=True,
        ),
        Bottleneck(
            preset="seq_bn",
            nonlinearity="leakyrelu",
            init="houlsby",
            original_ln_after=False,
            residual_before_ln=False,
            ln_after=True,
            adapter_residual_before_ln=True,
        ),
    )

    def budget(self, config: Bottleneck, base: Base) -> Budget:
        sites = config.sites(base)
        n = sum(math.prod(shape) for shape in self.shapes(config, base).values())
        flops = sum(2 * 2 * site.d_out * config.width(site) for site in sites)
        return Budget(trained=n, stored=n, stored_bytes=4 * n, added_flops=flops)

    def identity_at_start(self, config: Bottleneck) -> bool:
        """A is zero at the start, and what it is added to is y."""
        if config.adapter_residual_before_ln and config.ln_after:
            return False
        brings_stream = config.reads_sum and config.residual_before_ln is not True
        return config.init == "zero" and config.original_ln_after != brings_stream

    def shapes(self, config: Bottleneck, base: Base) -> Mapping[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for site in config.sites(base):
            D, R = site.d_out, config.width(site)
            special = {
                "down.weight": (R, D),
                "down.bias": (R,),
                "up.weight": (D, R),
                "scaling": (1,) if config.scaling == "learned" else (D,),
            }
            shapes |= {f"{site.key}.{part}": special.get(part, (D,)) for part in _parts(config)}
        return shapes

    def init(self, config: Bottleneck, base: Base, rng: torch.Generator) -> Delta:
        tensors = {}
        for name, shape in self.shapes(config, base).items():
            tensors[name] = _start(config, name, shape, rng).to(base.device)
        return self._delta(config, base, tensors)

    def _load(self, config: Bottleneck, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return self._delta(config, base, {n: t.to(base.device) for n, t in tensors.items()})

    def _delta(self, config: Bottleneck, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        sites = config.sites(base)
        return BottleneckDelta(config, sites, _norms(base, sites), tensors)


def _start(config: Bottleneck, name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    if name.endswith(("scaling", "ln_before.weight", "ln_after.weight")):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if config.init == "bert":
        return torch.empty(shape).normal_(0, 0.02, generator=rng)
    if config.init == "houlsby":
        return nn.init.trunc_normal_(torch.empty(shape), 0, 0.01, -0.02, 0.02, generator=rng)
    if name.endswith("up.weight"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[1])  # kaiming-uniform with a = sqrt(5)
    return torch.empty(shape).uniform_(-bound, bound, generator=rng)


METHOD = BottleneckMethod()
