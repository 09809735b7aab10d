"""AdapterFusion: learned attention over the outputs of finished bottleneck adapters, which stay as they are
(Pfeiffer et al. 2021, arXiv:2005.00247, section 3).

At each of the adapters' sites, and for each token by itself, with u what the adapters read and a_i = A_i(u) what they give:

    p = softmax_i((Q u + b) . K a_i)        out = r + V sum_i p_i a_i        r: what an adapter alone would be added to

Numbers as adapter-hub's (adapters 1.3, "dynamic"; "static" without V), given its weights: Q and K start at N(0, 0.02), V
close to the identity and is pulled to it. Left out of theirs: a bias of the keys, which moves all of a token's scores alike
and so changes nothing, and a temperature that falls with every forward pass, evaluation or not. K and V are applied to the
query and to the sum instead of to each a_i: the same, with one product where there would be one per adapter. Fused adapters
beside the sub-layer ("par") are added to y; theirs gain the stream x once too often.
Shapes: N packed tokens, S adapters, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tritune.errors import Problem
from tritune.methods import method_of
from tritune.methods.base import Budget, Delta, Method
from tritune.methods.bottleneck import METHOD as BOTTLENECK
from tritune.methods.bottleneck import Bottleneck, BottleneckDelta
from tritune.models.base import Site
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig, Strategy

#: what the fused adapters have to have in common, so that all read the same and are added to the same
COMMON = (
    "placement",
    "blocks",
    "leave_out",
    "top_layers",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
)


class Fusion(MethodConfig):
    """AdapterFusion.

    parts: the configs of the bottleneck adapters that are fused. They were trained before; here they stay.
    value: whether the weighted sum goes through a matrix V.
    pull: strength of the pull of V to the identity, this times the squared distance.
    """

    parts: tuple[Bottleneck, ...]
    value: bool = True
    pull: float = Field(default=0.01, ge=0)

    @field_validator("parts", mode="before")
    @classmethod
    def _any_sequence(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _fusable(self) -> Self:
        if reasons := why_not(self.parts):
            raise ValueError("; ".join(map(str, reasons)))
        return self

    def sites(self, base: Base) -> tuple[Site, ...]:
        return self.parts[0].sites(base)


def why_not(configs: Sequence[MethodConfig]) -> list[Problem]:
    """Every reason why these cannot be fused."""
    found = [] if len(configs) > 1 else [Problem("parts", "one adapter alone has nothing to be weighed against")]
    adapters: list[tuple[int, Bottleneck]] = []
    for i, config in enumerate(configs, 1):
        if not isinstance(config, Bottleneck):
            what = "is no bottleneck adapter: it has no outputs of its own to attend to"
            found.append(Problem(f"part {i} ({method_of(config).kind})", what))
            continue
        adapters.append((i, config))
        found += [
            Problem(f"part {i}, {option}", "with a norm of its own behind it, it is no addend that could be weighted")
            for option in ("ln_after", "adapter_residual_before_ln")
            if getattr(config, option)
        ]
    for option in COMMON:
        values = {f"part {i}": _meant(config, option) for i, config in adapters}
        if len({repr(value) for value in values.values()}) > 1:
            said = ", ".join(f"{value} in {part}" for part, value in values.items())
            found.append(Problem(option, f"{said}; fused adapters read the same and act at the same places"))
    return found


def _meant(config: Bottleneck, option: str) -> object:
    """An option's value, a default that depends on others filled in."""
    if option == "original_ln_before":
        return config.reads_sum
    return {*value} if isinstance(value := getattr(config, option), tuple) else value


class FusionDelta(Delta):
    """Per site: query.weight (D, D), query.bias (D), key.weight (D, D) and, where there is one, value.weight (D, D), which
    train; and the adapters, which do not."""

    def __init__(self, config: Fusion, tensors: Mapping[str, Tensor], parts: Sequence[Delta]) -> None:
        super().__init__(parts[0].sites())
        self.config = config
        for name, tensor in tensors.items():
            self.put(name, tensor)
        self.parts = nn.ModuleList(parts).requires_grad_(False)

    @property
    def adapters(self) -> tuple[BottleneckDelta, ...]:
        return tuple(self.parts)  # type: ignore[arg-type]

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return {name.replace("/", "."): p for name, p in self.named_parameters(recurse=False)}

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        part = {name: self.part(site, name).to(y_NE.dtype) for name in _parts(self.config)}
        u_ND, residual_ND = self.adapters[-1].reads(site, x_ND, y_NE)
        a_NSD = torch.stack([adapter.branch(site, u_ND) for adapter in self.adapters], 1)
        q_ND = F.linear(u_ND, part["query.weight"], part["query.bias"]) @ part["key.weight"]
        p_NS = (q_ND[:, None] * a_NSD).sum(-1).softmax(-1)
        c_ND = (p_NS[..., None] * a_NSD).sum(1)
        if self.config.value:
            c_ND = F.linear(c_ND, part["value.weight"])
        out_ND = residual_ND + c_ND
        return out_ND if self.config.parts[-1].original_ln_after else out_ND - x_ND  # the base adds x in any case

    def penalty(self) -> Tensor | None:
        if not (self.config.value and self.config.pull):
            return None
        values = [self.part(site, "value.weight") for site in self.sites()]
        one = torch.eye(len(values[0]), dtype=values[0].dtype, device=values[0].device)
        return self.config.pull * torch.stack([(value - one).square().sum() for value in values]).sum()

    def export(self) -> dict[str, Tensor]:
        own = {name: p.detach().clone() for name, p in self.trainable().items()}
        return own | {f"parts.{i}.{name}": t for i, a in enumerate(self.adapters) for name, t in a.export().items()}


def _parts(config: Fusion) -> tuple[str, ...]:
    return ("query.weight", "query.bias", "key.weight", *(("value.weight",) if config.value else ()))


class FusionMethod(Method[Fusion]):
    kind = "fusion"
    strategy = Strategy.ADAPTERS
    Config = Fusion
    summary = "learned attention over the outputs of finished bottleneck adapters"
    made_by = "learned attention over finished adapters: `tritune compose fuse A B --train FILE --out DIR` trains one"
    of_finished = True
    learning_rate = 5e-5
    variants: ClassVar = (
        Fusion(parts=tuple(Bottleneck(reduction_factor=r, init="bert", scaling=9.0) for r in (4.0, 8.0, 16.0))),
        Fusion(
            parts=(
                Bottleneck(placement="double_seq", reduction_factor=4.0, init="bert", scaling=9.0, leave_out=(1,)),
                Bottleneck(
                    placement="double_seq", reduction_factor=2.0, init="bert", nonlinearity="gelu", leave_out=(1,)
                ),
            ),
            value=False,
        ),
    )

    def _own_shapes(self, config: Fusion, base: Base) -> dict[str, tuple[int, ...]]:
        sizes = {site.key: site.d_out for site in config.sites(base)}
        return {
            f"{key}.{part}": (D,) if part.endswith("bias") else (D, D)
            for key, D in sizes.items()
            for part in _parts(config)
        }

    def learned_before(self, config: Fusion, base: Base) -> Mapping[str, tuple[int, ...]]:
        return {
            f"parts.{i}.{name}": shape
            for i, part in enumerate(config.parts)
            for name, shape in BOTTLENECK.shapes(part, base).items()
        }

    def shapes(self, config: Fusion, base: Base) -> Mapping[str, tuple[int, ...]]:
        return {**self._own_shapes(config, base), **self.learned_before(config, base)}

    def budget(self, config: Fusion, base: Base) -> Budget:
        parts = [BOTTLENECK.budget(part, base) for part in config.parts]
        own = sum(torch.Size(shape).numel() for shape in self._own_shapes(config, base).values())
        products = len(_parts(config)) - 1
        flops = sum(2 * products * site.d_out**2 for site in config.sites(base))
        stored = own + sum(part.stored for part in parts)
        added = flops + sum(part.added_flops for part in parts)
        return Budget(trained=own, stored=stored, stored_bytes=4 * stored, added_flops=added)

    def identity_at_start(self, config: Fusion) -> bool:
        return all(BOTTLENECK.identity_at_start(part) for part in config.parts)

    def init(self, config: Fusion, base: Base, rng: torch.Generator) -> Delta:
        tensors = {}
        for name, shape in self._own_shapes(config, base).items():
            tensors[name] = _start(name, shape, rng).to(base.device)
        return FusionDelta(config, tensors, [BOTTLENECK.init(part, base, rng) for part in config.parts])

    def _load(self, config: Fusion, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        own = {name: tensors[name].to(base.device) for name in self._own_shapes(config, base)}
        parts = []
        for i, part in enumerate(config.parts):
            names = BOTTLENECK.shapes(part, base)
            parts.append(BOTTLENECK.load(part, base, {name: tensors[f"parts.{i}.{name}"] for name in names}))
        return FusionDelta(config, own, parts)


def _start(name: str, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    if name.endswith("value.weight"):
        return torch.full(shape, 1e-6).fill_diagonal_(1.0)
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0, 0.02, generator=rng)


METHOD = FusionMethod()
