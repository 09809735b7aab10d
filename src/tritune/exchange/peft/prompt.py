"""PEFT's P_TUNING and PROMPT_TUNING: virtual tokens in front of the text. It stores the vectors, never the encoder.

Coming in, both are a prompt without an encoder; its vectors are all there is to train on from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.format import Incoming
from tritune.exchange.peft.codec import Codec, key_problems
from tritune.exchange.problems import tensor_problems
from tritune.methods.prompt_encoders import LSTM_LAYERS
from tritune.methods.ptuning import PTuning
from tritune.models.pretrained import Base

WITH_ENCODER, WITHOUT = "P_TUNING", "PROMPT_TUNING"
TENSOR = "prompt_embeddings"

_READ = frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules"})
# How the vectors came to be; and what PEFT fills in from the base and uses for other types only.
_IDLE = frozenset(
    {
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
        "num_attention_heads",
        "num_layers",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)


class PromptCodec(Codec):
    types: ClassVar = (WITH_ENCODER, WITHOUT)
    Config = PTuning

    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given, base = adaptation.config, adaptation.base
        assert isinstance(given, PTuning)
        Mismatch.check(
            "This prompt cannot be exported to PEFT.",
            [Problem("placement", f"'{given.placement}'; PEFT's prompts stand in front of the text")]
            if given.placement != "prefix"
            else [],
        )
        config: dict[str, Any] = {
            "modules_to_save": None,
            "num_attention_heads": base.config.num_attention_heads,
            "num_layers": base.config.num_hidden_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": given.tokens,
            "token_dim": base.d_embedding,
        }
        if given.encoder == "none" or given.origin != "peft":  # the vectors are all that is stored, whatever made them
            config |= {
                "peft_type": WITHOUT,
                "prompt_tuning_init": "RANDOM",
                "prompt_tuning_init_text": None,
                "tokenizer_kwargs": None,
                "tokenizer_name_or_path": None,
            }
        else:
            config |= {
                "encoder_dropout": 0.0,
                "encoder_hidden_size": given.hidden or base.d_embedding,
                "encoder_num_layers": LSTM_LAYERS,
                "encoder_reparameterization_type": given.encoder.upper(),
                "peft_type": WITH_ENCODER,
            }
        return config, {TENSOR: adaptation.delta.export()["prompt"]}

    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, where: str) -> Incoming:
        problems = key_problems(config, _READ, _IDLE)
        n, width = config.get("num_virtual_tokens"), config.get("token_dim")
        if not isinstance(n, int) or n < 1:
            problems.append(Problem("config key 'num_virtual_tokens'", f"is {n!r}, expected a number of tokens"))
            n = len(tensors[TENSOR]) if TENSOR in tensors and tensors[TENSOR].ndim else 1
        if width not in (None, base.d_embedding):
            problems.append(
                Problem("config key 'token_dim'", f"is {width!r}; an embedding of {base.name} has {base.d_embedding}")
            )
        if config.get("num_transformer_submodules") not in (None, 1):
            problems.append(Problem("config key 'num_transformer_submodules'", "is not 1, as of a decoder"))
        problems += tensor_problems(tensors, {TENSOR: (n, base.d_embedding)})
        Mismatch.check(f"{where} cannot be imported onto {base.name}.", problems)
        notes = ("its encoder was not stored; what is here is the prompt alone",) if _had_encoder(config) else ()
        return Incoming(
            PTuning(tokens=n, encoder="none", start="random"), {"prompt": tensors[TENSOR].float().contiguous()}, notes
        )


def _had_encoder(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type") == WITH_ENCODER
