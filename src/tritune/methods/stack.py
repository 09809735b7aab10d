"""Several adaptations answer every row together: a prompt with a LoRA, a bottleneck on a bottleneck, scales with a LoRA.

The order of the parts is that in which they would be merged: each part sees a linear map, or a sub-layer, as the parts before
it left it. With W' what the parts before made of W:

    LoRA     y = W'x + s B A x               LoRA upon LoRA is the sum of both terms, in any order
    IA3      y = l_out * (W' (l_in * x))     scales a LoRA that stands before it, and not one behind it
    bottleneck: reads and changes what the sub-layer with its own earlier parts gives (adapter-hub's `Stack`)

Virtual tokens go through the base with all other parts acting on them, as text does. In front of the text, and behind it, is
room for those of one part. Parts may be trained together, each at the rate of its own method, or put together when trained.
Shapes: N packed tokens, D and E input and output width of a site, r ranks of all terms together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from tritune.errors import NotMergeable, Problem
from tritune.methods import method, method_of, table
from tritune.methods.base import Budget, Delta, Method
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.methods.ptuning import PTuning
from tritune.models.base import DeepSegment, LowRank, Role, Scales, Segment, Site
from tritune.models.pretrained import Base
from tritune.models.quantised import Weights
from tritune.spec import Frozen, MethodConfig, Scope, Strategy

T = TypeVar("T")


class Part(Frozen):
    """A method by name and its config."""

    method: str
    config: SerializeAsAny[MethodConfig]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        """From a config alone, or from a document."""
        if isinstance(data, MethodConfig):
            return {"method": method_of(data).kind, "config": data}
        if not isinstance(data, Mapping) or data.get("method") not in table():
            raise ValueError(f"a part is {{method: ..., config: ...}}, with a method of: {', '.join(table())}")
        given = data.get("config", {})
        return {**data, "config": given if isinstance(given, MethodConfig) else _config(data["method"], given)}


def _config(kind: str, document: object) -> MethodConfig:
    try:
        config: MethodConfig = method(kind).Config.model_validate_json(json.dumps(document))
    except ValidationError as error:
        found = [f"{'.'.join(map(str, e['loc'])) or kind}: {e['msg']}" for e in error.errors(include_url=False)]
        raise ValueError(f"settings of {kind}: {'; '.join(found)}") from None
    return config


class Stack(MethodConfig):
    """Several methods at once.

    parts: configs in their order, tt.Stack(parts=[tt.PTuning(tokens=8), tt.LoRA(rank=4)]); in a document
        [{method: ptuning, config: {tokens: 8}}, ...].
    """

    parts: tuple[Part, ...] = Field(min_length=1)

    @classmethod
    def of(cls, configs: Sequence[MethodConfig]) -> Self:
        return cls(parts=tuple(Part(method=method_of(config).kind, config=config) for config in configs))

    def split(self, tensors: Mapping[str, Tensor]) -> list[tuple[MethodConfig, dict[str, Tensor]]]:
        """Each part's config and its own of a stack's exported tensors."""
        return [(part.config, _only(i, tensors)) for i, part in enumerate(self.parts)]

    @field_validator("parts", mode="before")
    @classmethod
    def _any_sequence(cls, given: Any) -> Any:
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _composable(self) -> Self:
        if reasons := why_not([part.config for part in self.parts]):
            raise ValueError("; ".join(map(str, reasons)))
        return self


def why_not(configs: Sequence[MethodConfig]) -> list[Problem]:
    """Every reason why these cannot answer together."""
    found = []
    places: Counter[str] = Counter()
    acting = 0  # parts so far that are more than a prompt
    for i, config in enumerate(configs, 1):
        its = method_of(config)
        where = f"part {i} ({its.kind})"
        if isinstance(config, Stack):
            found.append(Problem(where, "is a stack itself: give its parts in its place"))
        elif its.scope is Scope.BASE:
            what = (
                "replaces weights of the base, and the other parts belong to the base as it was. Make it a base of its own "
                "(export it as merged) and train the others on that"
            )
            found.append(Problem(where, what))
        elif acting and its.reads_weights(config):
            found.append(
                Problem(where, "is computed from the base's own weights: nothing that changes them stands before it")
            )
        places.update(its.prompts(config))
        acting += not its.prompts(config)
    for place, n in places.items():
        if n > 1:
            what = (
                f"{n} parts have virtual tokens there: each learned to stand next to the text, and one would stand between "
                "the text and the other. Train one longer prompt"
            )
            found.append(Problem(place, what))
    return found


class StackDelta(Delta):
    """The parts' deltas and the methods that they are of.

    Args:
        rate: the learning rate at which each part's own is its method's.
    """

    def __init__(self, parts: Sequence[Delta], methods: Sequence[Method[Any]], rate: float) -> None:
        super().__init__(tuple({site.key: site for part in parts for site in part.sites()}.values()))
        self.parts = nn.ModuleList(parts)
        self.methods = tuple(methods)
        self._rate = rate
        keys = [{site.key for site in part.sites()} for part in parts]
        #: numbers of the parts that act at a site
        self._at = {site.key: [i for i, own in enumerate(keys) if site.key in own] for site in self._sites}
        #: what each part let in at a site, between `enter` and `edit`
        self._entered: dict[str, list[Tensor]] = {}

    @property
    def members(self) -> tuple[Delta, ...]:
        return tuple(self.parts)  # type: ignore[arg-type]

    def _acting(self, site: Site) -> list[Delta]:
        members = self.members
        return [members[i] for i in self._at[site.key]]

    def trainable(self) -> Mapping[str, nn.Parameter]:
        return {name: p for i, part in enumerate(self.members) for name, p in of_part(i, part.trainable()).items()}

    def rate_factors(self) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for i, (part, its) in enumerate(zip(self.members, self.methods, strict=True)):
            own, factor = part.rate_factors(), its.learning_rate / self._rate
            found |= of_part(i, {name: factor * own.get(name, 1.0) for name in part.trainable()})
        return found

    def penalty(self) -> Tensor | None:
        found = [penalty for part in self.members if (penalty := part.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    @contextmanager
    def constants_held(self) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.members:
                stack.enter_context(part.constants_held())
            yield

    def export(self) -> dict[str, Tensor]:
        return {name: t for i, part in enumerate(self.members) for name, t in of_part(i, part.export()).items()}

    def segments(self) -> Sequence[Segment | DeepSegment]:
        return [segment for part in self.members for segment in part.segments()]

    def enter(self, site: Site, x_ND: Tensor, slot_N: Tensor | None) -> Tensor:
        """The last part stands outermost: what it lets in goes to the one before it."""
        acting = self._acting(site)
        if all(type(part).enter is Delta.enter for part in acting):
            return x_ND
        entered = []
        for part in reversed(acting):
            x_ND = part.enter(site, x_ND, slot_N)
            entered.append(x_ND)
        self._entered[site.key] = entered[::-1]
        return x_ND

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        acting = self._acting(site)
        entered = self._entered.pop(site.key, None) or [x_ND] * len(acting)
        for part, own_ND in zip(acting, entered, strict=True):
            y_NE = part.edit(site, own_ND, y_NE, slot_N)
        return y_NE

    def low_rank(self, site: Site) -> LowRank | None:
        terms = [part.low_rank(site) for part in self._acting(site)]
        there = [term for term in terms if term is not None]
        if len(there) < len(terms):
            return None
        if len(there) == 1:
            return there[0]
        A_rD = torch.cat([term.A_rD for term in there])
        return LowRank(A_rD, torch.cat([term.scale * term.B_Er for term in there], 1), 1.0)

    def scales(self, site: Site) -> Scales | None:
        acting = self._acting(site)
        return acting[0].scales(site) if len(acting) == 1 else None


def of_part(i: int, found: Mapping[str, T]) -> dict[str, T]:
    """What belongs to a part, by the names that it has in a stack."""
    return {f"parts.{i}.{name}": value for name, value in found.items()}


def _only(i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"parts.{i}."): t for name, t in tensors.items() if name.startswith(f"parts.{i}.")}


class _Rewritten(Base):
    """A base as if it had other weights: for arithmetic with them, not to compute with."""

    def __init__(self, base: Base, weights: Mapping[str, Tensor]) -> None:
        self.__dict__.update(base.__dict__)
        self._weights = weights

    def parameters(self) -> Weights:
        return Weights(self.model, self.dtype, self._weights)


class StackMethod(Method[Stack]):
    kind = "stack"
    strategy = Strategy.ADAPTERS
    Config = Stack
    summary = "several methods at once, each beside or upon those before it"
    made_by = (
        "several methods at once: `tritune compose stack A B --out DIR` makes one of finished adaptations; to train the "
        "parts at once, name them in a recipe, in its settings: {parts: [{method: ...}, {method: ...}]}"
    )
    learning_rate = 1e-3
    variants: ClassVar = (
        Stack(parts=(LoRA(rank=2), LoRA(rank=3, alpha=2.0, rank_stabilised=True, roles=(Role.ATTN_Q, Role.MLP_UP)))),  # type: ignore[arg-type]
        Stack(parts=(IA3(input_roles=(Role.ATTN_O, Role.MLP_DOWN)), LoRA(rank=2, dropout=0.1))),  # type: ignore[arg-type]
        Stack(parts=(LoRA(rank=2), IA3(output_roles=(Role.ATTN_V, Role.MLP_UP)))),  # type: ignore[arg-type]
        Stack(parts=(LoRA(rank=2, dora=True, roles=(Role.ATTN_Q, Role.MLP_UP)), LoRA(rank=2))),  # type: ignore[arg-type]
        Stack(parts=(Bottleneck(reduction_factor=8.0), Bottleneck(placement="double_seq"), LoRA(rank=2))),  # type: ignore[arg-type]
        Stack(parts=(PTuning(tokens=3, hidden=8), LoRA(rank=2, roles=(Role.ATTN_V,)), IA3())),  # type: ignore[arg-type]
        Stack(parts=(Prefix(tokens=3), PTuning(tokens=2, encoder="none", placement="suffix"), Bottleneck())),  # type: ignore[arg-type]
        Stack(parts=(PTuning(tokens=2, encoder="none"), Prefix(tokens=3, placement="suffix"), LoRA(rank=2))),  # type: ignore[arg-type]
    )

    def budget(self, config: Stack, base: Base) -> Budget:
        parts = [method_of(part.config).budget(part.config, base) for part in config.parts]
        return Budget(**{name: sum(getattr(part, name) for part in parts) for name in Budget.model_fields})

    def virtual_tokens(self, config: Stack) -> int:
        return sum(method_of(part.config).virtual_tokens(part.config) for part in config.parts)

    def prompts(self, config: Stack) -> list[Any]:
        return [place for part in config.parts for place in method_of(part.config).prompts(part.config)]

    def learned_before(self, config: Stack, base: Base) -> Mapping[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for i, part in enumerate(config.parts):
            found |= of_part(i, method_of(part.config).learned_before(part.config, base))
        return found

    def identity_at_start(self, config: Stack) -> bool:
        return all(method_of(part.config).identity_at_start(part.config) for part in config.parts)

    def shapes(self, config: Stack, base: Base) -> Mapping[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for i, part in enumerate(config.parts):
            found |= of_part(i, method_of(part.config).shapes(part.config, base))
        return found

    def init(self, config: Stack, base: Base, rng: torch.Generator) -> Delta:
        return self._stacked(config, [method_of(part.config).init(part.config, base, rng) for part in config.parts])

    def _load(self, config: Stack, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        parts = [method_of(p.config)._load(p.config, base, _only(i, tensors)) for i, p in enumerate(config.parts)]
        return self._stacked(config, parts)

    def _stacked(self, config: Stack, parts: Sequence[Delta]) -> Delta:
        return StackDelta(parts, [method_of(part.config) for part in config.parts], self.learning_rate)

    def unmergeable(self, config: Stack) -> str:
        parts = [(i, method_of(part.config), part.config) for i, part in enumerate(config.parts, 1)]
        reasons = [(i, its.kind, its.unmergeable(own)) for i, its, own in parts]
        return "\n".join(f"part {i} ({kind}): {reason}" for i, kind, reason in reasons if reason)

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        """One part after the other, each into what the ones before left."""
        assert isinstance(delta, StackDelta)
        merged: dict[str, Tensor] = {}
        reasons = []
        for i, (part, its) in enumerate(zip(delta.members, delta.methods, strict=True), 1):
            try:
                merged |= its.merge(part, _Rewritten(base, merged))
            except NotMergeable as error:
                reasons.append(f"part {i} ({its.kind}): {error}")
        if reasons:
            raise NotMergeable("\n".join(reasons))
        return merged


METHOD = StackMethod()
