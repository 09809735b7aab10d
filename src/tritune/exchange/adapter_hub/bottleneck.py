"""adapter-hub's bottleneck adapters: seq_bn, double_seq_bn, par_bn and scaled_par_bn, told apart by their flags.

Coming in, a layer that was left out gets an adapter whose up-projection is zero: the same function, and said.
Shapes: R bottleneck width, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Problem
from tritune.exchange.adapter_hub.codec import NAME, Codec, setting_problems
from tritune.exchange.format import Incoming
from tritune.exchange.problems import tensor_problems
from tritune.methods import method_of
from tritune.methods.bottleneck import Bottleneck, Nonlinearity
from tritune.models.base import Role
from tritune.models.load import Base
from tritune.models.sites import FAMILIES

_FLAGS = (
    "mh_adapter",
    "output_adapter",
    "original_ln_before",
    "original_ln_after",
    "residual_before_ln",
    "is_parallel",
)
#: our placement -> their flags
_PLACEMENTS: Mapping[str, tuple[bool, ...]] = {
    "seq": (False, True, True, True, True, False),
    "double_seq": (True, True, False, True, True, False),
    "par": (False, True, False, True, True, True),
}
_MODULES = {Role.BLOCK_ATTN: "attention_adapters", Role.BLOCK_MLP: "output_adapters"}
#: our part of a tensor's name -> theirs
_PARTS = {
    "down.weight": "adapter_down.0.weight",
    "down.bias": "adapter_down.0.bias",
    "up.weight": "adapter_up.weight",
    "up.bias": "adapter_up.bias",
    "scaling": "scaling",
}
_STARTS = {"bert": "bert", "zero": "mam_adapter"}
# Of training, or of kinds that are switched off by a key of their own (phm_layer, inv_adapter).
_IDLE = {
    "adapter_residual_before_ln",
    "architecture",
    "cross_adapter",
    "dropout",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
    "stochastic_depth",
}
_READ = {*_FLAGS, "leave_out", "non_linearity", "reduction_factor", "scaling", *_IDLE}


class BottleneckCodec(Codec):
    architecture = None
    Config = Bottleneck

    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = adaptation.config
        assert isinstance(given, Bottleneck)
        config: dict[str, Any] = {
            **dict(zip(_FLAGS, _PLACEMENTS[given.placement], strict=True)),
            "adapter_residual_before_ln": False,
            "cross_adapter": False,
            "dropout": 0.0,
            "init_weights": _STARTS[given.init],
            "init_weights_seed": None,
            "inv_adapter": None,
            "inv_adapter_reduction_factor": None,
            "leave_out": [],
            "ln_after": False,
            "ln_before": False,
            "non_linearity": given.nonlinearity,
            "phm_layer": False,
            "reduction_factor": given.reduction_factor,
            "scaling": given.scaling if given.scaling == "learned" else float(given.scaling),
            "stochastic_depth": 0.0,
            "use_gating": False,
        }
        names = _names(given, adaptation.base, NAME)
        return config, {names[name]: tensor for name, tensor in adaptation.delta.export().items()}

    def misfits(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> list[Problem]:
        problems = [*setting_problems(config, _READ, {}), *_value_problems(config, base)]
        if problems:
            return problems
        ours, left_out = _config(config), set(config.get("leave_out") or ())
        shapes = method_of(ours).shapes(ours, base)
        layers = {f"{site.key}.": site.layer for site in base.sites}
        wanted = {
            theirs: shapes[mine]
            for mine, theirs in _names(ours, base, name).items()
            if next(layer for key, layer in layers.items() if mine.startswith(key)) not in left_out
        }
        return tensor_problems(tensors, wanted)

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> Incoming:
        ours = _config(config)
        shapes = method_of(ours).shapes(ours, base)
        names = _names(ours, base, name)
        found = {
            mine: tensors[theirs].float() if theirs in tensors else torch.zeros(shapes[mine])
            for mine, theirs in names.items()
        }
        left_out = sum(theirs not in tensors for theirs in names.values()) // len(_parts(ours))
        note = f"{left_out} places that were left out got adapters that add zero"
        return Incoming(ours, found, (note,) if left_out else ())


def _config(config: Mapping[str, Any]) -> Bottleneck:
    scaling = config.get("scaling", 1.0)
    return Bottleneck(
        placement=_placement(config),  # type: ignore[arg-type]  # checked by _value_problems
        reduction_factor=float(config["reduction_factor"]),
        nonlinearity=config["non_linearity"].lower(),
        scaling="learned" if scaling == "learned" else float(scaling),
        init="bert" if config.get("init_weights", "bert") == "bert" else "zero",
    )


def _placement(config: Mapping[str, Any]) -> str | None:
    defaults = {
        "original_ln_before": False,
        "original_ln_after": True,
        "residual_before_ln": True,
        "is_parallel": False,
    }
    flags = tuple(config.get(flag, defaults.get(flag)) for flag in _FLAGS)
    return next((placement for placement, known in _PLACEMENTS.items() if known == flags), None)


def _value_problems(config: Mapping[str, Any], base: Base) -> list[Problem]:
    found = []
    if _placement(config) is None:
        flags = ", ".join(f"{flag} {config.get(flag)}" for flag in _FLAGS)
        found.append(Problem("config", f"{flags}: none of seq_bn, double_seq_bn, par_bn"))
    factor = config.get("reduction_factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
        found.append(Problem("config.reduction_factor", f"is {factor!r}, expected one number above 0 for all layers"))
    name = config.get("non_linearity")
    if not isinstance(name, str) or name.lower() not in get_args(Nonlinearity):
        found.append(Problem("config.non_linearity", f"is {name!r}, known: {', '.join(get_args(Nonlinearity))}"))
    scaling = config.get("scaling", 1.0)
    if scaling != "learned" and (isinstance(scaling, bool) or not isinstance(scaling, int | float)):
        found.append(Problem("config.scaling", f"is {scaling!r}, expected a number or 'learned'"))
    layers = base.config.num_hidden_layers
    left_out = config.get("leave_out") or []
    if not isinstance(left_out, list) or not all(isinstance(i, int) and 0 <= i < layers for i in left_out):
        found.append(Problem("config.leave_out", f"is {left_out!r}, expected numbers of layers below {layers}"))
    return found


def _parts(config: Bottleneck) -> list[str]:
    return [part for part in _PARTS if part != "scaling" or config.scaling == "learned"]


def _names(config: Bottleneck, base: Base, name: str) -> dict[str, str]:
    """Our name of every tensor -> theirs."""
    layers = FAMILIES[base.config.model_type](base.config).layers
    return {
        f"{site.key}.{part}": f"{layers}.{site.layer}.{_MODULES[site.role]}.adapters.{name}.{_PARTS[part]}"
        for site in config.sites(base)
        for part in _parts(config)
    }
