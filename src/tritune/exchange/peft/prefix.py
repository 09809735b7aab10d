"""PEFT's PREFIX_TUNING: keys and values in front of the text, a row per virtual token. It stores them, never the network.

Coming in, it is a prefix without a network. Shapes: n layers, P virtual tokens, K key heads, d head width; a row of theirs
holds layer 0's keys, layer 0's values, layer 1's keys and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.format import Incoming
from tritune.exchange.peft.codec import Codec, key_problems
from tritune.exchange.peft.prompt import TENSOR
from tritune.exchange.problems import tensor_problems
from tritune.methods.prefix import Prefix
from tritune.models.pretrained import Base

_READ = frozenset({"num_virtual_tokens", "num_transformer_submodules", "num_layers"})
# How the keys and values came to be; and sizes that PEFT takes from the base again when it loads.
_IDLE = frozenset({"encoder_hidden_size", "init_weights", "num_attention_heads", "prefix_projection", "token_dim"})


class PrefixCodec(Codec):
    types: ClassVar = ("PREFIX_TUNING",)
    Config = Prefix

    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = adaptation.config
        assert isinstance(given, Prefix)
        Mismatch.check(
            "PEFT cannot hold this prefix.",
            [Problem("placement", f"'{given.placement}'; PEFT's keys and values stand in front of the text")]
            if given.placement != "prefix"
            else [],
        )
        n, _, P, K, d = given.shape(adaptation.base)
        config = {
            "encoder_hidden_size": K * d,
            "modules_to_save": None,
            "num_attention_heads": K,
            "num_layers": n,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": P,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,  # with it, PEFT looks for the network that was not stored when it trains on
            "token_dim": K * d,
        }
        layers_n2PKd = adaptation.delta.export()["prefix"]
        return config, {TENSOR: layers_n2PKd.permute(2, 0, 1, 3, 4).flatten(1).contiguous()}

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, where: str) -> Incoming:
        problems = key_problems(config, _READ, _IDLE)
        n, K, d = base.cache_shape
        P = config.get("num_virtual_tokens")
        if isinstance(P, bool) or not isinstance(P, int) or P < 1:
            problems.append(Problem("config key 'num_virtual_tokens'", f"is {P!r}, expected a number of tokens"))
            P = len(tensors[TENSOR]) if TENSOR in tensors and tensors[TENSOR].ndim else 1
        if config.get("num_layers") not in (None, n):
            problems.append(Problem("config key 'num_layers'", f"is {config['num_layers']!r}; {base.name} has {n}"))
        if config.get("num_transformer_submodules") not in (None, 1):
            problems.append(Problem("config key 'num_transformer_submodules'", "is not 1, as of a decoder"))
        problems += tensor_problems(tensors, {TENSOR: (P, n * 2 * K * d)})
        Mismatch.check(f"{where} cannot be imported onto {base.name}.", problems)
        layers_n2PKd = tensors[TENSOR].float().view(P, n, 2, K, d).permute(1, 2, 0, 3, 4).contiguous()
        had_network = bool(config.get("prefix_projection"))
        notes = ("its network was not stored; what is here are the keys and values alone",) if had_network else ()
        return Incoming(Prefix(tokens=P, start="random"), {"prefix": layers_n2PKd}, notes)
