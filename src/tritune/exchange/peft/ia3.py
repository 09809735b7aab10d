"""PEFT's IA3: one vector of scales per module, on its outputs or (its "feedforward_modules") on its inputs.

A fused module has one vector for all its outputs, where ours are one per site: sites that are not scaled stand at one in
it, and a role that stands at one everywhere is left out again coming in. Shapes: D and E input and output width of a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.format import Incoming
from tritune.exchange.lora_terms import reaching
from tritune.exchange.modules import LinearModule, linear_modules, weighted_modules
from tritune.exchange.peft.codec import Codec, key_problems
from tritune.exchange.peft.lora import PREFIX
from tritune.exchange.peft.targets import bad_patterns, is_target
from tritune.exchange.problems import tensor_problems
from tritune.methods.base import linear_roles, sites_of
from tritune.methods.ia3 import IA3
from tritune.models.base import LINEAR_ROLES, Role
from tritune.models.pretrained import Base

_READ = frozenset({"exclude_modules", "feedforward_modules", "target_modules"})
# PEFT corrects fan_in_fan_out by itself.
_IDLE = frozenset({"fan_in_fan_out", "init_ia3_weights"})


class Ia3Codec(Codec):
    types: ClassVar = ("IA3",)
    Config = IA3

    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = adaptation.config
        assert isinstance(given, IA3)
        Mismatch.check(
            "These scales cannot be exported to PEFT.",
            [
                Problem(f"role '{role}'", "is scaled on both sides; PEFT has one side per module")
                for role in given.output_roles
                if role in given.input_roles
            ],
        )
        scales = {name: tensor.cpu() for name, tensor in adaptation.delta.export().items()}
        sites = {site.key for site in adaptation.delta.sites()}
        adapted = [
            module
            for module in linear_modules(adaptation.base).values()
            if any(site.key in sites for site, _ in module.sites)
        ]
        entering = {_target(module, given) for module in adapted if module.sites[0][0].role in given.input_roles}
        config = {
            "exclude_modules": None,
            "fan_in_fan_out": any(module.transposed for module in adapted),
            "feedforward_modules": sorted(entering),
            "init_ia3_weights": True,
            "modules_to_save": None,
            "peft_type": "IA3",
            "target_modules": sorted({_target(module, given) for module in adapted}),
        }
        return config, {_name(m.path): _vector(m, scales, entering=_target(m, given) in entering) for m in adapted}

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, where: str) -> Incoming:
        unreadable = [
            Problem(f"config key '{key}'", "holds what is no regular expression")
            for key in dict.fromkeys((*bad_patterns(config), *_bad_feedforward(config)))
        ]
        wanted, misfits = ({}, []) if unreadable else _wanted(config, tensors, base)
        problems = [*key_problems(config, _READ, _IDLE), *unreadable, *misfits]
        Mismatch.check(f"{where} cannot be imported onto {base.name}.", problems)
        entering = {path for path in wanted if _enters(config, path)}
        found: dict[str, Tensor] = {}
        for path, module in wanted.items():
            vector = tensors[_name(path)].float().flatten()
            for site, columns in module.sites:
                part = "in" if path in entering else "out"
                found[f"{site.key}.{part}"] = vector.clone() if columns is None else vector[module.rows_of(columns)]
        return _gathered(found, base)


def _target(module: LinearModule, given: IA3) -> str:
    """How a module is named among the targets: PEFT has no layers for IA3, so in some of them each by itself."""
    return module.within if given.top_layers is None else module.path


def _name(path: str) -> str:
    """PEFT's name of the scales of a module."""
    return f"{PREFIX}{path}.ia3_l"


def _vector(module: LinearModule, scales: Mapping[str, Tensor], *, entering: bool) -> Tensor:
    """(1, D) of inputs, or (E, 1) of outputs."""
    if entering:
        return scales[f"{module.sites[0][0].key}.in"][None].contiguous()
    out_E = torch.ones(module.d_out)
    for site, columns in module.sites:
        if (mine := scales.get(f"{site.key}.out")) is not None:
            out_E[module.rows_of(columns)] = mine
    return out_E[:, None]


def _enters(config: Mapping[str, Any], path: str) -> bool:
    """Whether a module's input is scaled; PEFT looks at how the name ends, wherever a part of it begins."""
    given = config.get("feedforward_modules") or ()
    return re.fullmatch(given, path) is not None if isinstance(given, str) else path.endswith(tuple(given))


def _bad_feedforward(config: Mapping[str, Any]) -> Iterator[str]:
    given = config.get("feedforward_modules")
    try:
        re.compile(given if isinstance(given, str) else "")
    except re.error:
        yield "feedforward_modules"


def _wanted(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[str, LinearModule], list[Problem]]:
    """The modules that the config wants, and everything in the tensors that is not that."""
    ours = linear_modules(base)
    names = weighted_modules(base)
    paths = [name for name in names if is_target(config, name)]
    problems = [
        Problem(f"module '{path}'", "is scaled there, and no site of ours") for path in paths if path not in ours
    ]
    if not paths:
        problems.append(
            Problem("config key 'target_modules'", f"{config.get('target_modules')!r} matches no module of {base.name}")
        )
    wanted = {path: ours[path] for path in paths if path in ours}
    problems += [
        Problem(f"module '{path}'", "has its input scaled, which several sites of ours share")
        for path, module in wanted.items()
        if _enters(config, path) and len(module.sites) > 1
    ]
    shapes: dict[str, tuple[int, ...]] = {
        _name(path): (1, module.d_in) if _enters(config, path) else (module.d_out, 1) for path, module in wanted.items()
    }
    return wanted, problems + tensor_problems(tensors, shapes)


def _gathered(scales: Mapping[str, Tensor], base: Base) -> Incoming:
    """Scales of sites as one config of ours: every site of its roles down to the first layer; at one where nothing was."""
    roles = {part: [role for role in LINEAR_ROLES if _has(role, part, scales, base)] for part in ("out", "in")}
    tensors = {}
    missing = 0
    top_layers = reaching({name.rpartition(".")[0] for name in scales}, base)
    for site in sites_of(base, linear_roles(base), top_layers):
        for part, width in (("out", site.d_out), ("in", site.d_in)):
            if site.role in roles[part]:
                name = f"{site.key}.{part}"
                missing += name not in scales
                tensors[name] = scales.get(name, torch.ones(width)).contiguous()
    notes = (f"{missing} places that the file leaves alone got scales of one",) if missing else ()
    return Incoming(
        IA3(output_roles=tuple(roles["out"]), input_roles=tuple(roles["in"]), top_layers=top_layers), tensors, notes
    )


def _has(role: Role, part: str, scales: Mapping[str, Tensor], base: Base) -> bool:
    """Whether a role is scaled: somewhere, and where it shares its matrix not only with ones."""
    sites = [site for site in base.sites if site.role == role and f"{site.key}.{part}" in scales]
    fused = any(base.weight_of(site)[1].fused for site in sites)
    learned = any(bool((scales[f"{site.key}.{part}"] != 1).any()) for site in sites)
    nothing = not any(bool((tensor != 1).any()) for tensor in scales.values())
    return bool(sites) and (not fused or learned or nothing)
