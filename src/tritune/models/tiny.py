"""Tiny random bases of every family, from configs: for tests, laws and examples. Milliseconds, no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tritune.models.library import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from tritune.models.load import quantise_layers
from tritune.models.pretrained import Base
from tritune.models.probe import probe
from tritune.spec import Digests, Quantisation, digest

VOCABULARY = 300

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OLD = {k: v for k, v in _SMALL.items() if k not in ("num_key_value_heads", "head_dim")}

#: name -> (model_type, config); windows are shorter than the rows of the tests
CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _SMALL),
    "llama-tied": ("llama", _SMALL | {"tie_word_embeddings": True}),
    "mistral": ("mistral", _SMALL | {"sliding_window": 6}),
    "qwen2": ("qwen2", {k: v for k, v in _SMALL.items() if k != "head_dim"}),
    "qwen3": ("qwen3", _SMALL),
    "gemma2": (
        "gemma2",
        _SMALL
        | {
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 20,
        },
    ),
    "gemma3": (
        "gemma3_text",
        _SMALL
        | {
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {k: v for k, v in _SMALL.items() if k != "head_dim"} | {"sliding_window": 7}),
    "gpt2": ("gpt2", _OLD),
    "gpt-neox": ("gpt_neox", _OLD),
    "gpt-neox-serial": ("gpt_neox", _OLD | {"use_parallel_residual": False}),
    "opt": (
        "opt",
        {k: v for k, v in _OLD.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "opt-post-norm": (
        "opt",
        {k: v for k, v in _OLD.items() if k != "intermediate_size"}
        | {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
}


def tiny_base(
    name: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    quantise: Quantisation | None = None,
    device: str = "cpu",
) -> Base:
    """A base with random weights and a byte tokenizer, that has passed the probe.

    Weights are drawn larger than by default, so that attention is far from uniform and a wrong mask shows.
    """
    kind, options = CONFIGS[name]
    config = AutoConfig.for_model(kind, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else parameter.data.add_(
                torch.randn_like(parameter) * 0.05
            )
    weights = digest({"tiny": name, "seed": seed})
    if quantise is not None:
        quantise_layers(model, quantise, dtype)
    base = Base(
        (model if quantise is not None else model.to(dtype)).to(device),
        byte_tokenizer(),
        f"tiny-{name}",
        Digests(weights=weights, config=weights, tokenizer=digest("bytes")),
    )
    probe(base)
    return base


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte behind three special tokens: exact, and no vocabulary file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<bos>", "<eos>")])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
