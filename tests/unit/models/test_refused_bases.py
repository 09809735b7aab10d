"""Bases that would be silently wrong when packed are refused by name, saying what was looked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tritune.errors import UnsupportedBase
from tritune.models import sites
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.models.probe import probe
from tritune.models.sites import Block, Family
from tritune.models.tiny import CONFIGS, byte_tokenizer, tiny_base
from tritune.spec import Digests


def test_an_unknown_family_says_what_was_looked_for() -> None:
    options = {**CONFIGS["llama"][1]}
    config = AutoConfig.for_model("olmo2", **options)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedBase) as caught:
        Base(model, byte_tokenizer(), "stranger", Digests(weights="w", config="c", tokenizer="t"))
    message = str(caught.value)
    for word in ("olmo2", "Olmo2ForCausalLM", "attn.q", "mlp.down", "block.mlp", "llama", "gpt_neox"):
        assert word in message


def test_a_family_whose_modules_moved_says_which_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Family(
        layers="model.layers",
        linear={Role.ATTN_Q: "self_attn.wq"},
        attn=Block("input_layernorm", "self_attn"),
        mlp=Block("post_attention_layernorm", "mlp"),
    )
    monkeypatch.setitem(sites.FAMILIES, "llama", lambda _: moved)
    with pytest.raises(UnsupportedBase, match=r"'llama'.*'self_attn\.wq'.*LlamaDecoderLayer"):
        tiny_base("llama")


#: families that mix tokens outside attention, or attend by a function of their own: type, options, layers, any sub-layer
_GQA = {k: v for k, v in CONFIGS["llama"][1].items() if k != "num_hidden_layers"} | {"num_hidden_layers": 3}
MIXERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mamba": (
        {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "backbone.layers",
        "norm",
    ),
    "recurrent_gemma": (
        {**_GQA, "lru_width": 32, "attention_window_size": 6, "block_types": ["recurrent", "recurrent", "attention"]},
        "model.layers",
        "channel_pre_norm",
    ),
    "lfm2": ({**_GQA, "layer_types": ["conv", "full_attention", "conv"]}, "model.layers", "operator_norm"),
    "qwen3_next": (
        {
            **_GQA,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "model.layers",
        "input_layernorm",
    ),
    "falcon_h1": (
        {
            **_GQA,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
        "model.layers",
        "input_layernorm",
    ),
    "bloom": (
        {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "transformer.h",
        "input_layernorm",
    ),
}


def stranger(monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], layers: str, inside: str) -> Base:
    """A tiny model whose family the table is made to know, so that only the probe can refuse it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    family = Family(layers=layers, linear={}, attn=Block(inside, inside), mlp=Block(inside, inside))
    monkeypatch.setitem(sites.FAMILIES, kind, lambda _: family)
    return Base(model, byte_tokenizer(), f"tiny-{kind}", Digests(weights="w", config="c", tokenizer="t"))


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.filterwarnings("ignore")  # those models warn about missing kernels
def test_a_model_that_mixes_tokens_elsewhere_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    base = stranger(monkeypatch, kind, *MIXERS[kind])
    with pytest.raises(UnsupportedBase) as caught:
        probe(base)
    assert f"tiny-{kind}" in str(caught.value)
    assert type(base.model).__name__ in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_attention_sinks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
    base = stranger(monkeypatch, "gpt_oss", options, "model.layers", "input_layernorm")
    with pytest.raises(UnsupportedBase, match=r"tiny-gpt_oss.*sinks"):
        probe(base)
