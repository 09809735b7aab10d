"""What a method is: how one adaptation is made, trained, stored and put back. One file per method, one line in the table.

    Method.init -> Delta      the learned part of one adaptation; itself the `Edits` for "every row is mine"
    Delta.export / Method.load      exactly what serving needs, by name
    Bank                      many deltas, of any kinds, in one batch: the correct slow way

Knows bases and tensors; no task, no optimizer, no file.
Shapes: N packed tokens, D and E input and output width of a site, P virtual tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from tritune.errors import Mismatch, NotMergeable, Problem
from tritune.models.base import END_ROLES, LINEAR_ROLES, DeepSegment, LowRank, Role, Scales, Segment, Site
from tritune.models.dtype import at_least_float32
from tritune.models.pretrained import Base
from tritune.spec import Frozen, MethodConfig, Scope, Strategy

C = TypeVar("C", bound=MethodConfig)
Place = Literal["in front of the text", "behind the text"]


class Budget(Frozen):
    """What a config costs on a base, by arithmetic alone.

    `trained` and `stored` count numbers, `stored_bytes` bytes of the exported tensors. `added_flops` are floating point
    operations that a forward pass gains per packed token of a row (a virtual prompt passes once per batch, not per row).
    """

    trained: int
    stored: int
    stored_bytes: int
    added_flops: int = 0


class Delta(nn.Module, ABC):
    """The learned part of one adaptation. Its parameters are kept in fp32 even where the base computes in less; some as two
    halves of that (`rests`).

    By default every parameter trains. A tensor's name is a site's key and its part ("layers.3.attn.q.A").
    """

    def __init__(self, sites: Sequence[Site] = ()) -> None:
        super().__init__()
        self._sites = tuple(sites)

    def put(self, name: str, tensor: Tensor) -> None:
        """Add a parameter; names may hold dots, which torch reserves."""
        self.register_parameter(name.replace(".", "/"), nn.Parameter(at_least_float32(tensor)))

    def part(self, site: Site, name: str) -> Tensor:
        parameter = self._parameters[f"{site.key}.{name}".replace(".", "/")]
        assert parameter is not None
        return parameter

    def trainable(self) -> Mapping[str, nn.Parameter]:
        """Exactly what the optimizer gets."""
        return {name.replace("/", "."): p for name, p in self.named_parameters()}

    def rests(self) -> Mapping[str, Tensor]:
        """Of trained tensors that are bf16: what their fp32 masters have besides (`models/halves.py`), by name."""
        return {}

    def rate_factors(self) -> Mapping[str, float]:
        """What the learning rate of a trained tensor is multiplied by; those that are not named learn at the full rate."""
        return {}

    def penalty(self) -> Tensor | None:
        """What is added to the loss of every optimizer step, whatever the rows; None: nothing."""
        return None

    def constants_held(self) -> AbstractContextManager[None]:
        """Open while what the method's definition takes for a constant in its gradient (DoRA's norms) keeps its value: in
        there the gradient is that of the loss itself."""
        return nullcontext()

    def state(self) -> Mapping[str, Tensor]:
        """Everything needed to train on: more than `export` where an encoder is thrown away afterwards."""
        return {name.replace("/", "."): tensor for name, tensor in self.state_dict().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, strict."""
        torch_names = {name.replace("/", "."): name for name in self.state_dict()}
        self.load_state_dict({torch_names.get(name, name): tensor for name, tensor in state.items()})

    @abstractmethod
    def export(self) -> dict[str, Tensor]:
        """What serving needs, and no tensor of the base."""

    # --- the door ---

    def sites(self) -> Sequence[Site]:
        return self._sites

    def segments(self) -> Sequence[Segment | DeepSegment]:
        return ()

    def enter(self, site: Site, x_ND: Tensor, slot_N: Tensor | None) -> Tensor:
        return x_ND

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        return y_NE

    def low_rank(self, site: Site) -> LowRank | None:
        return None

    def scales(self, site: Site) -> Scales | None:
        return None

    def weights(self) -> Mapping[str, Tensor]:
        return {}

    def slots(self) -> None:
        return None


class Method(ABC, Generic[C]):
    """One concrete way inside a strategy. Stateless."""

    kind: ClassVar[str]
    strategy: ClassVar[Strategy]
    scope: ClassVar[Scope] = Scope.ROW
    Config: type[C]
    #: one sentence for help texts
    summary: ClassVar[str]
    #: of a method that is made of others: what it is, and which command makes one
    made_by: ClassVar[str] = ""
    #: whether those have to be finished, so that nothing but that command makes one
    of_finished: ClassVar[bool] = False
    #: peak learning rate of AdamW that works without a search
    learning_rate: ClassVar[float]
    #: small configs that reach every option; the laws run each of them
    variants: ClassVar[Sequence[MethodConfig]]

    @abstractmethod
    def budget(self, config: C, base: Base) -> Budget:
        """Arithmetic, no tensor made."""

    @abstractmethod
    def init(self, config: C, base: Base, rng: torch.Generator) -> Delta:
        """A fresh delta, ready to train."""

    @abstractmethod
    def shapes(self, config: C, base: Base) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of what `export` gives."""

    def load(self, config: C, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        """A delta that answers as the exported one did.

        Raises:
            Mismatch: with every missing, surplus, misshapen or non-finite tensor.
        """
        Mismatch.check(
            f"These tensors are no '{self.kind}' adaptation of {base.name} with {config!r}.",
            self.misfits(config, base, tensors),
        )
        return self._load(config, base, tensors)

    def misfits(self, config: C, base: Base, tensors: Mapping[str, Tensor]) -> list[Problem]:
        """Every difference between these tensors and what `export` would give."""
        return misfits(tensors, self.shapes(config, base))

    @abstractmethod
    def _load(self, config: C, base: Base, tensors: Mapping[str, Tensor]) -> Delta: ...

    def stores_base(self, config: C) -> bool:
        """Whether what is exported is a whole base, to be stored as one."""
        return self.scope is Scope.BASE

    def virtual_tokens(self, config: C) -> int:
        """Tokens that every row gets beside its own, wherever they stand: they take of the positions the base has."""
        return 0

    def prompts(self, config: C) -> Collection[Place]:
        """Where the virtual tokens stand. At each place a row has room for those of one method."""
        places: tuple[Place, ...] = ("in front of the text",)
        return places if self.virtual_tokens(config) else ()

    def reads_weights(self, config: C) -> bool:
        """Whether what it adds at a site is computed from the base's own weights there (a norm of them, say), so that it is
        wrong upon a method that changed what they do."""
        return False

    def learned_before(self, config: C, base: Base) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of tensors that were learned elsewhere and stay as they are. `init` draws them at random;
        training does not begin without them."""
        return {}

    def identity_at_start(self, config: C) -> bool:
        """Whether a fresh delta leaves every output of the base as it is."""
        return True

    def moves_codes(self, config: C) -> bool:
        """Whether it moves, on any base, weights that a quantised base keeps as codes."""
        return False

    def unmergeable(self, config: C) -> str:
        """Why no base at all could hold it in its own weights; "": some can."""
        return "" if type(self).merge is not Method.merge else self._no_equal()

    def _no_equal(self) -> str:
        return f"'{self.kind}' has no equal among the base's own weights."

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        """The base's parameters that change when the delta is folded into them, by name.

        Raises:
            NotMergeable: there are no such weights; says why.
        """
        raise NotMergeable(self._no_equal())


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """Every difference between the tensors that are there and those that should be."""
    found = [Problem(name, "missing") for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            found.append(Problem(name, "does not belong to this method on this base"))
        elif tuple(tensor.shape) != tuple(shapes[name]):
            found.append(Problem(name, f"has shape {tuple(tensor.shape)}, expected {tuple(shapes[name])}"))
        elif not bool(torch.isfinite(tensor).all()):
            found.append(Problem(name, "holds values that are not finite"))
    return found


def sites_of(base: Base, roles: Sequence[Role], top_layers: int | None = None) -> tuple[Site, ...]:
    """The base's sites with these roles; of the layers only the last so many.

    Raises:
        Mismatch: a role that no layer of this base has (an adaptation that matches nothing would answer as the base), or
            fewer layers than were asked for.
    """
    absent = [role for role in roles if all(site.role != role for site in base.sites)]
    present = sorted({str(site.role) for site in base.sites})
    Mismatch.check(
        f"{base.name} lacks places that this method was asked to act at.",
        [*(Problem(f"role '{role}'", "no layer has it") for role in absent), *too_many_layers(base, top_layers)],
        hint=f"Roles of this base: {', '.join(present)}." if absent else "",
    )
    first = first_layer(base, top_layers)
    return tuple(site for site in base.sites if site.role in roles and (site.role in END_ROLES or site.layer >= first))


def first_layer(base: Base, top_layers: int | None) -> int:
    """The first of the last so many layers; None: of all."""
    n_layers = base.cache_shape[0]
    return n_layers - (top_layers or n_layers)


def too_many_layers(base: Base, top_layers: int | None) -> list[Problem]:
    """More layers than the base has."""
    if first_layer(base, top_layers) >= 0:
        return []
    return [Problem("top_layers", f"{top_layers}, but the base has {base.cache_shape[0]} layers")]


def linear_roles(base: Base) -> tuple[Role, ...]:
    """All linear roles this base has (GPT-2 has no gate)."""
    present = {site.role for site in base.sites}
    return tuple(role for role in LINEAR_ROLES if role in present)


class Bank:
    """Many adaptations, of any kinds, on one base in one batch. Row by row the right one answers; BARE rows none. A batch
    with any other slot is refused by `Base.logits`.

    Where a base computes low-rank terms beside its own products, those of all slots go in one pass. Elsewhere the slow
    correct way: one call per slot and site.

    Raises:
        Mismatch: an adaptation that replaces the whole base cannot share a batch.
    """

    def __init__(self, deltas: Mapping[int, Delta]) -> None:
        Mismatch.check(
            "These adaptations cannot share a batch.",
            [Problem(f"slot {slot}", "replaces the whole base") for slot, d in deltas.items() if d.weights()],
        )
        self.deltas = dict(deltas)
        self._keys = {slot: {site.key for site in delta.sites()} for slot, delta in deltas.items()}
        #: deltas that leave every input as it is are not asked: gathering their rows would cost more than they do
        self._entering = [slot for slot, delta in deltas.items() if type(delta).enter is not Delta.enter]

    def sites(self) -> Sequence[Site]:
        return tuple({site.key: site for delta in self.deltas.values() for site in delta.sites()}.values())

    def segments(self) -> Sequence[Segment | DeepSegment]:
        found: list[Segment | DeepSegment] = []
        for slot, delta in self.deltas.items():
            with self.turn(slot):
                found += [replace(segment, slot=slot) for segment in delta.segments()]
        return found

    def turn(self, slot: int) -> AbstractContextManager[None]:
        """Open while an adaptation is asked for what it does; for banks that give each a random generator of its own."""
        return nullcontext()

    def enter(self, site: Site, x_ND: Tensor, slot_N: Tensor | None) -> Tensor:
        assert slot_N is not None, "a bank needs a batch with slots"
        for slot in self._entering:
            if site.key in self._keys[slot]:
                mine = (slot_N == slot).nonzero()[:, 0]
                if len(mine):
                    with self.turn(slot):
                        x_ND = x_ND.index_copy(0, mine, self.deltas[slot].enter(site, x_ND[mine], None))
        return x_ND

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        assert slot_N is not None, "a bank needs a batch with slots"
        for slot, delta in self.deltas.items():
            if site.key in self._keys[slot]:
                mine = (slot_N == slot).nonzero()[:, 0]
                if len(mine):
                    with self.turn(slot):
                        y_NE = y_NE.index_copy(0, mine, delta.edit(site, x_ND[mine], y_NE[mine], None))
        return y_NE

    def low_rank(self, site: Site) -> Mapping[int, LowRank] | None:
        """Where every adaptation that acts at a site has but a low-rank term, nothing is gathered."""
        found = {}
        for slot, delta in self.deltas.items():
            if site.key in self._keys[slot]:
                term = delta.low_rank(site)
                if term is None:
                    return None
                found[slot] = term
        return found

    def scales(self, site: Site) -> None:
        """Each would be that of some rows only."""

    def weights(self) -> Mapping[str, Tensor]:
        return {}

    def slots(self) -> Collection[int]:
        return self.deltas.keys()
