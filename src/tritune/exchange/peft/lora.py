"""PEFT's LORA: low-rank terms on modules, where ours are on sites. Fused modules are taken apart and put together.

DoRA's lengths (`lora_magnitude_vector`) are per output of a module: where only some sites of a fused module are adapted, the
others' are those of the base. Beside the terms of an embedding or a head PEFT may store the base's own matrix: it is compared
with ours and left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.format import Incoming
from tritune.exchange.lora_terms import alpha_of, gathered, terms_of
from tritune.exchange.modules import LinearModule, LowRank, fuse, linear_modules, split, weighted_modules
from tritune.exchange.peft.codec import Codec, key_problems
from tritune.exchange.peft.targets import bad_patterns, by_pattern, is_target
from tritune.exchange.problems import tensor_problems
from tritune.methods.base import first_layer
from tritune.methods.lora import LoRA
from tritune.models.base import END_ROLES, LINEAR_ROLES
from tritune.models.pretrained import Base

PREFIX = "base_model.model."
ROLES = (*LINEAR_ROLES, *END_ROLES)
#: PEFT's own rank and alpha where a config names none
DEFAULT = 8

_READ = frozenset(
    {
        "alpha_pattern",
        "exclude_modules",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "r",
        "rank_pattern",
        "target_modules",
        "use_dora",
        "use_rslora",
    }
)
# Of training, of sharded layers of Megatron, or of the way the start was found. PEFT corrects fan_in_fan_out by itself.
_IDLE = frozenset(
    {
        "bias",  # checked below: "none" is a value that changes nothing
        "eva_config",
        "loftq_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
_LEFT_OUT = "the base's own matrices that PEFT stores beside an embedding's terms were left out: they are this base's"
# The other starts change the base's own weights too; a file of these fits only a base that was changed alike.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class LoraCodec(Codec):
    types: ClassVar = ("LORA",)
    Config = LoRA

    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = adaptation.config
        assert isinstance(given, LoRA)
        fused = fused_terms(adaptation)
        ranks = {module.within: term.rank for module, term in fused}
        alphas = {module.within: alpha_of(term.scale, term.rank, given.rank_stabilised) for module, term in fused}
        r = min(ranks.values())
        alpha = next(alphas[within] for within, rank in ranks.items() if rank == r)
        config = {
            "alpha_pattern": {re.escape(within): its for within, its in alphas.items() if its != alpha},
            "bias": "none",
            "corda_config": None,
            "eva_config": None,
            "exclude_modules": None,
            "fan_in_fan_out": any(module.transposed for module, _ in fused),
            "init_lora_weights": True,
            "layer_replication": None,
            "layers_pattern": None,
            "layers_to_transform": _layers(given, adaptation.base),
            "loftq_config": {},
            "lora_alpha": alpha,
            "lora_bias": False,
            "lora_dropout": given.dropout,
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": r,
            "rank_pattern": {re.escape(within): rank for within, rank in ranks.items() if rank != r},
            "target_modules": sorted(
                ranks
            ),  # an embedding or a head by its whole name: in no layer, and adapted all the same
            "target_parameters": None,
            "trainable_token_indices": None,
            "use_dora": given.dora,
            "use_rslora": given.rank_stabilised,
        }
        tensors: dict[str, Tensor] = {}
        for module, term in fused:
            names = names_of(module, dora=given.dora)
            tensors |= {names[part]: t for part, t in (("A", term.A), ("B", term.B), ("m", term.m)) if t is not None}
        return config, tensors

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, where: str) -> Incoming:
        unreadable = list(_unreadable(config))
        wanted, misfits = ({}, []) if unreadable else _wanted(config, tensors, base)
        problems = [*key_problems(config, _READ, _IDLE), *_other_meanings(config), *unreadable, *misfits]
        Mismatch.check(f"{where} cannot be imported onto {base.name}.", problems)
        stabilised, dropout = bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0)
        dora = bool(config.get("use_dora"))
        terms: dict[str, LowRank] = {}
        for one in wanted.values():
            found = {part: tensors[name].float() for part, name in names_of(one.module, dora=dora).items()}
            term = LowRank(found["A"], found["B"], one.scale(stabilised=stabilised), found.get("m"))
            terms |= split(one.module, term)
        result = gathered(terms, base, stabilised=stabilised, dropout=dropout)
        stored = sum(base_name(path) in tensors for path in wanted)
        return replace(result, notes=(*result.notes, *([_LEFT_OUT] if stored else [])))


def _layers(given: LoRA, base: Base) -> list[int] | None:
    """Numbers of the layers that take part; None: all."""
    if given.top_layers is None:
        return None
    return list(range(first_layer(base, given.top_layers), base.cache_shape[0]))


def fused_terms(adaptation: Adaptation) -> list[tuple[LinearModule, LowRank]]:
    """The adapted modules of the base, each with one low-rank term."""
    terms = terms_of(adaptation)
    modules = [m for m in linear_modules(adaptation.base, ROLES).values() if any(s.key in terms for s, _ in m.sites)]
    shared = all(_same([terms[s.key].A for s, _ in m.sites if s.key in terms]) for m in modules)
    return [(module, fuse(module, terms, shared=shared)) for module in modules]


def names_of(module: LinearModule, *, dora: bool) -> dict[str, str]:
    """PEFT's names of A, B and m on a module."""
    form = "lora_embedding_{}" if module.looked_up else "lora_{}.weight"
    names = {part: f"{PREFIX}{module.path}.{form.format(part)}" for part in "AB"}
    return names | ({"m": f"{PREFIX}{module.path}.lora_magnitude_vector"} if dora else {})


def base_name(path: str) -> str:
    """PEFT's name of the base's own matrix of an adapted module."""
    return f"{PREFIX}{path}.base_layer.weight"


def _same(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a config wants on a module."""

    module: LinearModule
    rank: int
    alpha: float

    def scale(self, *, stabilised: bool) -> float:
        return self.alpha / (math.sqrt(self.rank) if stabilised else self.rank)


def _other_meanings(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Values that say something which is not in the tensors."""
    if config.get("bias") not in (None, "none"):
        yield Problem("config key 'bias'", f"is {config['bias']!r}: biases of the base were trained too")
    if (start := config.get("init_lora_weights")) not in _HARMLESS_STARTS:
        yield Problem(
            "config key 'init_lora_weights'",
            f"is {start!r}, which changed the base too; save it as plain LoRA: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _unreadable(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Values without which no shape can be told."""
    if not _is_rank(config.get("r", DEFAULT)):
        yield Problem("config key 'r'", f"is {config['r']!r}, expected a whole number above 0")
    if not _is_weight(config.get("lora_alpha", DEFAULT)):
        yield Problem("config key 'lora_alpha'", f"is {config['lora_alpha']!r}, expected a number above 0")
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_weight)):
        values = config.get(key) or {}
        if not isinstance(values, dict) or not all(map(fits, values.values())):
            yield Problem(f"config key '{key}'", f"is {values!r}, expected patterns and their numbers")
    for key in dict.fromkeys(bad_patterns(config)):
        yield Problem(f"config key '{key}'", "holds what is no regular expression")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _wanted(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, _Wanted], list[Problem]]:
    """What the config wants of every module of this base, and everything in the tensors that is not that."""
    ours = linear_modules(base, ROLES)
    dora = bool(config.get("use_dora"))
    names = weighted_modules(base)
    if config.get("target_modules") in (None, "all-linear"):  # PEFT stores what these came to; by hand they may remain
        paths = [path for path, module in ours.items() if names_of(module, dora=dora)["A"] in tensors]
    else:
        paths = [name for name in names if is_target(config, name)]
    problems = [
        Problem(f"module '{path}'", "is adapted there, and no site of ours") for path in paths if path not in ours
    ]
    if not paths:
        problems.append(
            Problem("config key 'target_modules'", f"{config.get('target_modules')!r} matches no module of {base.name}")
        )
    wanted = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        if path in ours:
            rank = int(by_pattern(config.get("rank_pattern") or {}, path, config.get("r", DEFAULT)))
            alpha = float(by_pattern(config.get("alpha_pattern") or {}, path, config.get("lora_alpha", DEFAULT)))
            wanted[path] = _Wanted(ours[path], rank, alpha)
            sizes = {"A": (rank, ours[path].d_in), "B": (ours[path].d_out, rank), "m": (ours[path].d_out,)}
            shapes |= {name: sizes[part] for part, name in names_of(ours[path], dora=dora).items()}
    learned = {n: t for n, t in tensors.items() if n not in {base_name(path) for path in wanted}}
    problems += [problem for one in wanted.values() for problem in _other_base(one.module, tensors)]
    return wanted, problems + tensor_problems(learned, shapes)


def _other_base(module: LinearModule, tensors: Mapping[str, Tensor]) -> Iterator[Problem]:
    """A matrix of the base beside the terms, that is not this base's."""
    stored, own = tensors.get(base_name(module.path)), module.matrix.weight.detach().cpu()
    if stored is not None and (stored.shape != own.shape or not torch.equal(stored.to(own.dtype), own)):
        yield Problem(
            base_name(module.path), "is not this base's own matrix: it was trained too, or the base is another"
        )
