"""adapter-hub's LoRA: on q, k, v of attention and on the two outer matrices of the feed-forward; nothing elsewhere.

A fused c_attn (GPT-2) keeps one A and one B for each of q, k, v that take part, above each other: as ours. There is one rank
and one alpha for all: smaller ranks go out filled with zeros, other scales in B, and so they come back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.adapter_hub.codec import NAME, Codec, setting_problems
from tritune.exchange.format import Incoming
from tritune.exchange.lora_terms import alpha_of, gathered, largest, plain_problems, terms_of, uniform
from tritune.exchange.modules import LinearModule, LowRank, linear_modules
from tritune.exchange.problems import tensor_problems
from tritune.methods.base import first_layer
from tritune.methods.lora import LoRA
from tritune.models.base import END_ROLES, Role, Site
from tritune.models.pretrained import Base

_ATTENTION = {Role.ATTN_Q: "q", Role.ATTN_K: "k", Role.ATTN_V: "v"}
#: family -> which matrix the keys `intermediate_lora` and `output_lora` mean. On Llama adapter-hub has them crossed.
_FEED_FORWARD = {
    "llama": {"intermediate_lora": Role.MLP_DOWN, "output_lora": Role.MLP_UP},
    "mistral": {"intermediate_lora": Role.MLP_DOWN, "output_lora": Role.MLP_UP},
    "gpt2": {"intermediate_lora": Role.MLP_UP, "output_lora": Role.MLP_DOWN},
}
#: adapter-hub's own rank and alpha where a config names none
DEFAULT = 8
_READ = {
    "alpha",
    "architecture",
    "attn_matrices",
    "composition_mode",
    "dropout",
    "dtype",
    "init_weights",
    "init_weights_seed",
    "intermediate_lora",
    "leave_out",
    "output_lora",
    "r",
    "selfattn_lora",
}


class LoraCodec(Codec):
    architecture = "lora"
    Config = LoRA

    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given, base = adaptation.config, adaptation.base
        assert isinstance(given, LoRA)
        roles = {site.role for site in adaptation.delta.sites()}
        feed_forward = _FEED_FORWARD[base.config.model_type]
        Mismatch.check(
            "adapter-hub's LoRA cannot act where this one does.",
            [
                *plain_problems(adaptation),
                *(
                    Problem(f"role '{role}'", f"adapter-hub has no LoRA there on '{base.config.model_type}'")
                    for role in sorted(roles - {*_ATTENTION, *feed_forward.values(), *END_ROLES})
                ),
            ],
            "Export it in PEFT's format, or train it with other roles.",
        )
        terms = uniform(terms_of(adaptation))
        rank, scale = largest(terms.values())
        left_out = list(range(first_layer(base, given.top_layers)))
        config = {
            "alpha": alpha_of(scale, rank, stabilised=False),
            "architecture": self.architecture,
            "attn_matrices": [letter for role, letter in _ATTENTION.items() if role in roles],
            "composition_mode": "add",
            "dropout": given.dropout,
            "init_weights": "lora",
            "init_weights_seed": None,
            "leave_out": left_out,
            "r": rank,
            "selfattn_lora": bool(roles & set(_ATTENTION)),
            "use_dora": False,
            "use_gating": False,
            **{key: role in roles for key, role in feed_forward.items()},
        }
        tensors: dict[str, Tensor] = {}
        for module, sites in _adapted(base, roles, left_out).items():
            A, B = _names(module, NAME)
            tensors[A] = torch.cat([terms[site.key].A for site in sites])
            tensors[B] = torch.cat([terms[site.key].B for site in sites])
        return config, tensors

    def misfits(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> list[Problem]:
        problems = [*setting_problems(config, _READ, {}), *_value_problems(config, base)]
        if problems:
            return problems
        r = config.get("r", DEFAULT)
        shapes: dict[str, tuple[int, ...]] = {}
        for module, sites in _wanted(config, base).items():
            A, B = _names(module, name)
            shapes |= {A: (r * len(sites), module.d_in), B: (sum(site.d_out for site in sites), r)}
        return tensor_problems(tensors, shapes)

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> Incoming:
        scale = config.get("alpha", DEFAULT) / config.get("r", DEFAULT)
        terms: dict[str, LowRank] = {}
        for module, sites in _wanted(config, base).items():
            A, B = (tensors[each].float() for each in _names(module, name))
            parts = zip(sites, A.chunk(len(sites)), torch.split(B, [site.d_out for site in sites]), strict=True)
            terms |= {site.key: LowRank(a.clone(), b.clone(), scale) for site, a, b in parts}
        return gathered(terms, base, stabilised=False, dropout=float(config.get("dropout") or 0))


def _roles(config: Mapping[str, Any], base: Base) -> set[Role]:
    letters = config.get("attn_matrices", ["q", "v"]) if config.get("selfattn_lora", True) else []
    attention = {role for role, letter in _ATTENTION.items() if letter in letters}
    return attention | {role for key, role in _FEED_FORWARD[base.config.model_type].items() if config.get(key)}


def _adapted(base: Base, roles: set[Role], left_out: Collection[int] = ()) -> dict[LinearModule, list[Site]]:
    """Modules that take part, and their sites with these roles in the order of q, k, v."""
    sites = {
        module: [site for site, _ in module.sites if site.role in roles]
        for module in linear_modules(base).values()
        if module.layer not in left_out
    }
    return {module: chosen for module, chosen in sites.items() if chosen}


def _wanted(config: Mapping[str, Any], base: Base) -> dict[LinearModule, list[Site]]:
    return _adapted(base, _roles(config, base), set(config.get("leave_out") or ()))


def _names(module: LinearModule, name: str) -> tuple[str, str]:
    return f"{module.path}.loras.{name}.lora_A", f"{module.path}.loras.{name}.lora_B"


def _value_problems(config: Mapping[str, Any], base: Base) -> list[Problem]:
    found = []
    if config.get("composition_mode", "add") != "add":
        found.append(Problem("config.composition_mode", f"is {config['composition_mode']!r}, expected 'add'"))
    r, alpha = config.get("r", DEFAULT), config.get("alpha", DEFAULT)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        found.append(Problem("config.r", f"is {r!r}, expected a whole number above 0"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        found.append(Problem("config.alpha", f"is {alpha!r}, expected a number above 0"))
    matrices = config.get("attn_matrices", [])
    if not isinstance(matrices, list) or not set(map(str, matrices)) <= set(_ATTENTION.values()):
        found.append(Problem("config.attn_matrices", f"is {matrices!r}, expected some of q, k, v"))
    elif not found and not _roles(config, base):
        found.append(Problem("config", "names no matrix to act on"))
    left_out = config.get("leave_out") or []
    if not isinstance(left_out, list) or not all(isinstance(i, int) for i in left_out):
        found.append(Problem("config.leave_out", f"is {left_out!r}, expected numbers of layers"))
    return found
