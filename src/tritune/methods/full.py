"""Full fine-tuning: every weight of the base moves, or every weight of chosen parts (biases: Ben Zaken et al. 2022, BitFit,
arXiv:2106.10199; norms; the last layers; embeddings).

The base itself stays as it is: the delta owns a copy of what moves in fp32 (the master), and the forward pass sees it in
the base's own format, which is one half of a master where that is bf16 (`models/halves.py`). What is exported is what was
computed with, so a bf16 base exports bf16. A whole base is stored as a plain Hugging Face folder; chosen parts are stored
alone, and answer together with the base they were taken from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tritune.errors import Mismatch, Problem
from tritune.methods.base import Budget, Delta, Method
from tritune.models.halves import halve, halved, whole
from tritune.models.pretrained import Base
from tritune.models.sites import FAMILIES
from tritune.spec import MethodConfig, Scope, Strategy

#: the layer of what stands in front of all layers and is no embedding
FRONT = -1
Part = Literal["bias", "norms", "layers", "embeddings", "head"]


class Full(MethodConfig):
    """Full fine-tuning, of the whole base or of parts.

    parts: which weights move, one or more of "bias" (every bias term, BitFit), "norms", "layers" (everything in the layers),
        "embeddings" (of tokens and positions; with a tied head, the head too) and "head" (where it has its own weights);
        null: all of them.
    top_layers: of the layers only the last so many; null: all. Other weights in front of them stay too, with parts null also
        the embeddings.
    layer_decay: each layer learns at so many times the rate of the one behind it (ELECTRA, Clark et al. 2020,
        arXiv:2003.10555); what stands behind the layers learns at the full rate, embeddings at the lowest. 1: all the same.
    l2_sp: strength of the pull back to the base, this / 2 times the squared distance (Li et al. 2018, L2-SP,
        arXiv:1802.01483); 0: none.
    """

    parts: tuple[Part, ...] | None = Field(default=None, min_length=1)
    top_layers: int | None = Field(default=None, ge=1)
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    l2_sp: float = Field(default=0.0, ge=0)

    @property
    def is_whole(self) -> bool:
        return self.parts is None and self.top_layers is None

    def chosen(self, base: Base) -> dict[str, Tensor]:
        """The base's parameters that move, by name.

        Raises:
            Mismatch: a part that this base has no weight of, fewer layers than were asked for, or weights that are quantised:
                codes cannot take a step.
        """
        kinds, layers = _kinds(base), _layers(base)
        n_layers = 1 + max(layers.values())
        first = FRONT if self.top_layers is None else n_layers - self.top_layers
        reached = [name for name in kinds if layers.get(name, n_layers) >= first]
        problems = [
            Problem(f"part '{part}'", "no weight of this base is one")
            for part in self.parts or ()
            if not any(part in kinds[name] for name in reached)
        ]
        if (self.top_layers or 0) > n_layers:
            problems.append(Problem("top_layers", f"{self.top_layers}, but the base has {n_layers} layers"))
        tied = any(problem.where == "part 'head'" for problem in problems)
        Mismatch.check(
            f"{base.name} cannot be trained in these parts.",
            problems,
            hint="A tied head is its embedding: name 'embeddings'." if tied else "",
        )
        if self.is_whole:
            wanted = reached
        elif self.parts is None:
            wanted = [name for name in reached if "embeddings" not in kinds[name]]
        else:
            wanted = [name for name in reached if kinds[name] & {*self.parts}]
        own = base.parameters()
        codes = own.quantised.intersection(wanted)
        Mismatch.check(
            f"{base.name} is quantised, and full fine-tuning would have to move what is quantised.",
            [Problem(f"{len(codes)} weights", f"are {base.quantised} codes, which learn nothing")] if codes else (),
            hint="Load it without quantise; or train parts that stay numbers ('norms', 'bias', 'embeddings', 'head'); "
            "or take a method that leaves the base frozen.",
        )
        return {name: own[name] for name in wanted}


def _kinds(base: Base) -> dict[str, set[str]]:
    """Which parts each parameter belongs to. A norm is told by its weight, the only kind that is a vector."""
    kinds: dict[str, set[str]] = {name: set() for name in base.parameters()}
    prefix = _prefix(base)
    head = base.model.get_output_embeddings()
    for full in kinds:  # a tied head is listed once, as the embedding it is
        path, _, name = full.rpartition(".")
        module = base.model.get_submodule(path)
        weight = getattr(module, "weight", None)  # a quantised module has none
        told = {
            "bias": name == "bias",
            "norms": weight is not None and weight.ndim == 1,
            "layers": full.startswith(prefix),
            "embeddings": isinstance(module, nn.Embedding),
            "head": module is head,
        }
        kinds[full] |= {part for part, is_one in told.items() if is_one}
    return kinds


def _prefix(base: Base) -> str:
    """What the names of all weights of layers begin with."""
    return f"{FAMILIES[base.config.model_type](base.config).layers}."


def _layers(base: Base) -> dict[str, int]:
    """The number of each parameter's layer, or `FRONT`; embeddings and parameters behind the layers are not in it."""
    family = FAMILIES[base.config.model_type](base.config)
    inside = f"{family.layers}."
    found = {}
    for name in base.parameters():
        if name.startswith(inside):
            found[name] = int(name.removeprefix(inside).partition(".")[0])
        elif any(name.startswith(f"{path}.") for path in family.front):
            found[name] = FRONT
    return found


def _steps_from_the_end(base: Base) -> dict[str, int]:
    """0 behind the layers, 1 in the last one, ...; embeddings lie deepest."""
    kinds, layers = _kinds(base), _layers(base)
    n_layers = 1 + max(layers.values())
    outside = {name: n_layers + 1 if "embeddings" in kinds[name] else 0 for name in kinds}
    return {name: n_layers - layers[name] if name in layers else outside[name] for name in kinds}


class _Masters(Mapping[str, Tensor]):
    """fp32 weights, each made when it is taken: there are never all of them beside what they are made of."""

    def __init__(self, weights: Mapping[str, Tensor], rests: Mapping[str, Tensor]) -> None:
        self._weights, self._rests = weights, rests

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name].detach()
        return whole(weight, self._rests[name]) if name in self._rests else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class FullDelta(Delta):
    """A copy of every base weight that moves, in fp32; over a bf16 base in two halves, the first of which is what the base
    computes with.

    Args:
        origin: the base's own weights, for the pull back to them; they are not copied.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        origin: Mapping[str, Tensor] | None = None,
        l2_sp: float = 0.0,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.l2_sp = l2_sp
        self._origin = dict(origin or {})
        self._factors = dict(factors or {})
        self._rests: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            self._take(name, tensor.detach().contiguous(), dtype)

    def _take(self, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
        if dtype is not torch.bfloat16:
            self.put(name, tensor.clone())
        elif tensor.dtype is torch.bfloat16:
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor.clone()))
            self._rests[name] = torch.zeros_like(tensor, dtype=torch.int16)
        else:
            near, self._rests[name] = halved(tensor.float())
            self.register_parameter(name.replace(".", "/"), nn.Parameter(near))

    def rests(self) -> Mapping[str, Tensor]:
        return self._rests

    def weights(self) -> Mapping[str, Tensor]:
        return self.trainable()

    def rate_factors(self) -> Mapping[str, float]:
        return self._factors

    def penalty(self) -> Tensor | None:
        if not self.l2_sp:
            return None
        distances = [self._distance(name, p).square().sum() for name, p in self.trainable().items()]
        return self.l2_sp / 2 * torch.stack(distances).sum()

    def _distance(self, name: str, p: Tensor) -> Tensor:
        """From the base; its gradient is p's."""
        origin = self._origin[name]
        if name not in self._rests:
            return p - origin.to(p.dtype)
        rest = whole(p.detach(), self._rests[name]) - p.detach().float()
        return p.float() + rest - origin.float()

    def state(self) -> Mapping[str, Tensor]:
        return _Masters(self.trainable(), self._rests)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        super().restore({name: tensor.float() if name in self._rests else tensor for name, tensor in state.items()})
        for name, rest in self._rests.items():
            halve(state[name].float().clone(), self.trainable()[name].data, rest)

    def export(self) -> dict[str, Tensor]:
        return {name: tensor.detach().contiguous() for name, tensor in self.weights().items()}

    def start_somewhere_in_rounding(self, rng: torch.Generator) -> None:
        """Move weights that are bf16 numbers, each to a random place among the fp32 numbers that round to it.

        What the base computes is the same. But numbers that stand in the middle of what rounds to them have to move by half
        the distance of two bf16 numbers before anything changes: at 3e-5 a step, weights around 0.1 do nothing at all for
        eight steps, and norms for sixty. From random places, as many of them cross over at once as should.
        """
        for name, rest in sorted(self._rests.items()):
            drawn = torch.randint(-(2**15) + 1, 2**15, rest.shape, generator=rng, dtype=torch.int16)
            rest.copy_(drawn).masked_fill_(
                self.weights()[name] == 0, 0
            )  # zero has no room on both sides, and needs none


class FullMethod(Method[Full]):
    kind = "full"
    strategy = Strategy.FULL
    scope = Scope.BASE
    Config = Full
    summary = "every weight of the base moves, or every weight of chosen parts"
    learning_rate = 3e-5
    variants: ClassVar = (
        Full(),
        Full(parts=("norms",), top_layers=2, layer_decay=0.5, l2_sp=0.1),
        Full(top_layers=1),
        Full(parts=("embeddings", "layers"), layer_decay=0.8),
    )

    def stores_base(self, config: Full) -> bool:
        return config.is_whole

    def moves_codes(self, config: Full) -> bool:
        return config.parts is None or "layers" in config.parts

    def budget(self, config: Full, base: Base) -> Budget:
        n = sum(p.numel() for p in config.chosen(base).values())
        return Budget(trained=n, stored=n, stored_bytes=n * base.dtype.itemsize)

    def init(self, config: Full, base: Base, rng: torch.Generator) -> Delta:
        chosen = config.chosen(base)
        steps = _steps_from_the_end(base)
        factors = {name: config.layer_decay ** steps[name] for name in chosen}
        delta = FullDelta(chosen, base.dtype, origin=chosen, l2_sp=config.l2_sp, factors=factors)
        delta.start_somewhere_in_rounding(rng)
        return delta

    def shapes(self, config: Full, base: Base) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in config.chosen(base).items()}

    def _load(self, config: Full, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return FullDelta({name: t.to(base.device) for name, t in tensors.items()}, base.dtype)

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        return delta.export()


METHOD = FullMethod()
