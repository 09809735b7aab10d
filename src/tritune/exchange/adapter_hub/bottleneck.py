"""adapter-hub's bottleneck adapters, with every option that both have: where they sit, what they read, norms, scales.

A norm in front of the adapter is kept twice there, as `adapter_norm_before` and as the first part of `adapter_down`; both
are one. Only families that norm before the sum are exchanged: adapter-hub patches no other of ours by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.adapter_hub.codec import NAME, Codec, setting_problems
from tritune.exchange.format import Incoming
from tritune.exchange.problems import tensor_problems
from tritune.methods import method_of
from tritune.methods.base import first_layer
from tritune.methods.bottleneck import Bottleneck
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.models.sites import FAMILIES

_MODULES = {Role.BLOCK_ATTN: "attention_adapters", Role.BLOCK_MLP: "output_adapters"}
#: our placement -> its sub-layers, whether adapters read the sum with the stream, whether they stand beside the sub-layer
_PLACEMENTS: Mapping[str, tuple[tuple[str, ...], bool, bool]] = {
    "seq": (("mlp",), True, False),
    "double_seq": (("attn", "mlp"), False, False),
    "par": (("mlp",), False, True),
}
#: keys of theirs that are called differently here
_RENAMED = {"non_linearity": "nonlinearity", "init_weights": "init"}
#: keys that mean the same in both, and what they are where a config names none
_SAME: Mapping[str, Any] = {
    "dropout": 0.0,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "adapter_residual_before_ln": False,
    "original_ln_after": True,
    "reduction_factor": None,
    "residual_before_ln": True,
    "scaling": 1.0,
}
_STARTS = {"bert": "bert", "houlsby": "houlsby", "zero": "mam_adapter"}
# Of training, or of kinds that are switched off by a key of their own (phm_layer, inv_adapter).
_IDLE = {
    "architecture",
    "cross_adapter",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
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
_READ = {
    *_SAME,
    *_RENAMED,
    "is_parallel",
    "mh_adapter",
    "original_ln_before",
    "output_adapter",
    *_IDLE,
}


class BottleneckCodec(Codec):
    architecture = None
    Config = Bottleneck

    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = adaptation.config
        assert isinstance(given, Bottleneck)
        plain = given.model_dump(mode="json")
        blocks = given.blocks or _PLACEMENTS[given.placement][0]
        config: dict[str, Any] = {
            **{key: plain[key] for key in _SAME},
            "leave_out": sorted({*given.leave_out, *range(first_layer(adaptation.base, given.top_layers))}),
            "cross_adapter": False,
            "init_weights": _STARTS[given.init],
            "init_weights_seed": None,
            "inv_adapter": None,
            "inv_adapter_reduction_factor": None,
            "is_parallel": given.parallel,
            "mh_adapter": "attn" in blocks,
            "non_linearity": given.nonlinearity,
            "original_ln_before": given.reads_sum,
            "output_adapter": "mlp" in blocks,
            "phm_layer": False,
            "stochastic_depth": 0.0,
            "use_gating": False,
        }
        tensors: dict[str, Tensor] = {}
        own = adaptation.delta.export()
        for mine, theirs in _names(given, adaptation.base, NAME).items():
            tensors |= {name: own[mine].clone() for name in theirs}
        return config, tensors

    def misfits(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> list[Problem]:
        problems = setting_problems(config, _READ, {})
        try:
            ours = _config(config)
            shapes = method_of(ours).shapes(ours, base)
        except Mismatch as error:
            return [*problems, *error.problems]
        if problems:
            return problems
        names = _names(ours, base, name)
        problems = tensor_problems(tensors, {each: shapes[mine] for mine, theirs in names.items() for each in theirs})
        return problems or [
            Problem(theirs[1], f"is another tensor than {theirs[0]}, which it should be")
            for theirs in names.values()
            if len(theirs) > 1 and not tensors[theirs[0]].equal(tensors[theirs[1]])
        ]

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> Incoming:
        ours = _config(config)
        names = _names(ours, base, name)
        return Incoming(ours, {mine: tensors[theirs[0]].float() for mine, theirs in names.items()})


def _config(config: Mapping[str, Any]) -> Bottleneck:
    """
    Raises:
        Mismatch: values that are none of ours; by the keys there.
    """
    blocks = tuple(block for key, block in (("mh_adapter", "attn"), ("output_adapter", "mlp")) if config.get(key))
    given: dict[str, Any] = {key: config.get(key, default) for key, default in _SAME.items()}
    given["leave_out"] = given["leave_out"] or []
    given["nonlinearity"] = str(config.get("non_linearity")).lower()
    start = config.get("init_weights", "bert")
    given["init"] = next((mine for mine, theirs in _STARTS.items() if theirs == start), start)
    given["placement"] = "par" if config.get("is_parallel") else "double_seq" if "attn" in blocks else "seq"
    usual, reads_sum, _ = _PLACEMENTS[given["placement"]]
    if blocks != usual:
        given["blocks"] = list(blocks)
    if (before := config.get("original_ln_before", False)) is not reads_sum:
        given["original_ln_before"] = before
    try:
        return Bottleneck.read(given, "config")
    except Mismatch as error:
        raise Mismatch(error.title, [Problem(_their_key(p.where), p.what) for p in error.problems]) from None


def _their_key(where: str) -> str:
    """'config, field 'nonlinearity'' -> 'config.non_linearity'"""
    field = where.split("'")[1].split(".")[0] if "'" in where else ""
    back = {ours: theirs for theirs, ours in _RENAMED.items()} | {
        "blocks": "output_adapter",
        "placement": "is_parallel",
    }
    return f"config.{back.get(field, field)}" if field.isidentifier() else "config"


def _names(config: Bottleneck, base: Base, name: str) -> dict[str, tuple[str, ...]]:
    """Our name of every tensor -> theirs."""
    layers = FAMILIES[base.config.model_type](base.config).layers
    sites = {site.key: site for site in config.sites(base)}
    found = {}
    for mine in method_of(config).shapes(config, base):
        key = next(key for key in sites if mine.startswith(f"{key}."))
        site = sites[key]
        there = f"{layers}.{site.layer}.{_MODULES[site.role]}.adapters.{name}"
        found[mine] = tuple(f"{there}.{part}" for part in _parts(mine.removeprefix(f"{key}."), config))
    return found


def _parts(mine: str, config: Bottleneck) -> tuple[str, ...]:
    """Their names of one of our parts. The linear map comes second in `adapter_down` where a norm comes first."""
    part, _, kind = mine.partition(".")
    if part == "scaling":
        return ("scaling",)
    if part == "ln_before":
        return f"adapter_norm_before.{kind}", f"adapter_down.0.{kind}"
    down = f"adapter_down.{1 if config.ln_before else 0}"
    return (f"{({'down': down, 'up': 'adapter_up', 'ln_after': 'adapter_norm_after'})[part]}.{kind}",)
