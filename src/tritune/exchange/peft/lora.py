"""PEFT's LORA: low-rank terms on modules, where ours are on sites. Fused modules are taken apart and put together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from tritune.methods.lora import LoRA
from tritune.models.load import Base

PREFIX = "base_model.model."
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
            "layers_to_transform": None,
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
            "target_modules": sorted(ranks),
            "target_parameters": None,
            "trainable_token_indices": None,
            "use_dora": False,
            "use_rslora": given.rank_stabilised,
        }
        tensors: dict[str, Tensor] = {}
        for module, term in fused:
            tensors |= dict(zip(names_of(module.path), (term.A, term.B), strict=True))
        return config, tensors

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, where: str) -> Incoming:
        unreadable = list(_unreadable(config))
        wanted, misfits = ({}, []) if unreadable else _wanted(config, tensors, base)
        problems = [*key_problems(config, _READ, _IDLE), *_other_meanings(config), *unreadable, *misfits]
        Mismatch.check(f"{where} cannot be imported onto {base.name}.", problems)
        stabilised, dropout = bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0)
        terms: dict[str, LowRank] = {}
        for path, one in wanted.items():
            A_rD, B_Er = (tensors[name].float() for name in names_of(path))
            terms |= split(one.module, LowRank(A_rD, B_Er, one.scale(stabilised=stabilised)))
        return gathered(terms, base, stabilised=stabilised, dropout=dropout)


def fused_terms(adaptation: Adaptation) -> list[tuple[LinearModule, LowRank]]:
    """The adapted modules of the base, each with one low-rank term."""
    terms = terms_of(adaptation)
    modules = [m for m in linear_modules(adaptation.base).values() if any(s.key in terms for s, _ in m.sites)]
    shared = all(_same([terms[s.key].A for s, _ in m.sites if s.key in terms]) for m in modules)
    return [(module, fuse(module, terms, shared=shared)) for module in modules]


def names_of(path: str) -> tuple[str, str]:
    """PEFT's names of A and B on a module."""
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


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
    ours = linear_modules(base)
    names = weighted_modules(base)
    if config.get("target_modules") in (None, "all-linear"):  # PEFT stores what these came to; by hand they may remain
        paths = [path for path in ours if any(name in tensors for name in names_of(path))]
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
            shapes |= dict(zip(names_of(path), ((rank, ours[path].d_in), (ours[path].d_out, rank)), strict=True))
    return wanted, problems + tensor_problems(tensors, shapes)
