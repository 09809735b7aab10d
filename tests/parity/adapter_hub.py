"""What both sides of the comparison with adapter-hub share: tiny models, cases, weights and rows. Plain data and numpy.

Read by `record_adapter_hub.py` in an environment with the `adapters` package and by `test_adapter_hub.py` in ours; knows
neither. Weights are drawn by name from numpy's RandomState, whose numbers are the same in every version. A new case is one
line in CASES.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

_SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA = {**_SMALL, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}

#: name -> (model_type, config)
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": None}),
    "gpt2": ("gpt2", {k: v for k, v in _SMALL.items() if k != "intermediate_size"} | {"n_inner": 24}),
    "qwen2": ("qwen2", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gpt-neox": ("gpt_neox", _SMALL),
    "opt-post-norm": (
        "opt",
        {k: v for k, v in _SMALL.items() if k != "intermediate_size"}
        | {"ffn_dim": 24, "word_embed_proj_dim": 12, "do_layer_norm_before": False, "dropout": 0.0},
    ),
}

#: name -> adapter-hub's config to begin with, and what is changed of it
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "seq_bn": ("seq_bn", {}),
    "double_seq_bn": ("double_seq_bn", {}),
    "par_bn": ("par_bn", {}),
    "scaled_par_bn": ("scaled_par_bn", {}),
    "seq_bn of another width": ("seq_bn", {"reduction_factor": 4.0, "non_linearity": "gelu", "scaling": 0.5}),
    "attention only": ("double_seq_bn", {"output_adapter": False, "non_linearity": "tanh"}),
    "both blocks on the whole stream": ("double_seq_bn", {"original_ln_before": True, "non_linearity": "gelu_new"}),
    "per layer": (
        "seq_bn",
        {"reduction_factor": {"1": 2, "default": 4.0}, "leave_out": [0], "non_linearity": "sigmoid"},
    ),
    "a scale per channel": ("seq_bn", {"scaling": "channel", "reduction_factor": 2, "non_linearity": "leakyrelu"}),
    "own norms": ("seq_bn", {"ln_before": True, "ln_after": True, "reduction_factor": 4.0}),
    "own norm of the sum": ("double_seq_bn", {"ln_after": True, "adapter_residual_before_ln": True}),
    "own norms in parallel": ("par_bn", {"ln_before": True, "ln_after": True}),
    "the stream as residual": (
        "seq_bn",
        {"original_ln_after": False, "residual_before_ln": False, "scaling": "channel"},
    ),
    "the stream twice": ("seq_bn", {"residual_before_ln": False}),
    "no stream": ("seq_bn", {"original_ln_after": False}),
    "added after the sum": ("seq_bn", {"residual_before_ln": "post_add"}),
    "lora": ("lora", {"r": 3, "alpha": 5, "attn_matrices": ["q", "k", "v"]}),
    "lora everywhere": ("lora", {"r": 2, "alpha": 3, "intermediate_lora": True, "output_lora": True}),
}
LORAS = ("lora", "lora everywhere")

#: the packaged base, read from a folder: compared live, since a recording of its gradients would be as large as it is
REAL = "smollm2-135m"

_EVERYWHERE = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "per layer", "own norm of the sum")
_NATIVE_ONLY = ("the stream as residual", "no stream")
#: which cases each model sees: all of them one pre-norm and one post-norm family, where they mean something
SEEN: Mapping[str, tuple[str, ...]] = {
    "llama": tuple(name for name in CASES if name != "added after the sum"),
    "mistral": (*_EVERYWHERE, *LORAS),
    "gpt2": (*_EVERYWHERE, *_NATIVE_ONLY, *LORAS),
    "qwen2": (*_EVERYWHERE, *LORAS),
    "gpt-neox": ("seq_bn", "double_seq_bn", "par_bn"),
    "opt-post-norm": tuple(name for name in CASES if name not in _NATIVE_ONLY),
    REAL: ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", *LORAS),
}

_PARTS = {
    "adapter_norm_before": "ln_before",
    "adapter_down.0": "down",
    "adapter_down.1": "down",
    "adapter_up": "up",
    "adapter_norm_after": "ln_after",
}


#: where LoRA acts -> our roles; several: one matrix for all of them
_ROLES = {
    "q_proj": ("attn.q",),
    "k_proj": ("attn.k",),
    "v_proj": ("attn.v",),
    "c_attn": ("attn.q", "attn.k", "attn.v"),
    "up_proj": ("mlp.up",),
    "c_fc": ("mlp.up",),
    "fc1": ("mlp.up",),
    "down_proj": ("mlp.down",),
    "c_proj": ("mlp.down",),
    "fc2": ("mlp.down",),
}


def our_names(theirs: str, lora: Sequence[str]) -> tuple[str, ...]:
    """The names that the parts of one of adapter-hub's parameters have here, from above; none: it is the base's.

    Args:
        lora: roles of attention that take part, where the case is one of LoRA.
    """
    if found := re.search(r"\.(\d+)\.(?:\w+\.)?(\w+)\.loras\.a\.lora_([AB])$", theirs):
        layer, module, part = found.groups()
        roles = [role for role in _ROLES[module] if role[-1] in lora or role.startswith("mlp")]
        return tuple(f"layers.{layer}.{role}.{part}" for role in roles)
    found = re.search(r"\.(\d+)\.(attention|output)_adapters\.adapters\.a\.(.+)$", theirs)
    if found is None:
        return ()
    layer, block, part = found.groups()
    for their_part, ours in _PARTS.items():
        part = re.sub(rf"^{re.escape(their_part)}\.", f"{ours}.", part)
    return (f"layers.{layer}.block.{'attn' if block == 'attention' else 'mlp'}.{part}",)


def base_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of a base: far enough from nothing that everything matters."""
    name = name.replace("embed_out.", "lm_head.")  # GPT-NeoX's head was called so before transformers 5
    spread = 0.3 if len(shape) > 1 else 0.05
    return _drawn(name, shape) * spread + (1.0 if len(shape) == 1 and name.endswith("weight") else 0.0)


def adapter_value(name: str, shape: tuple[int, ...], model: str) -> torch.Tensor:
    """A weight of an adapter, by our name, as after some training."""
    spread = 0.01 if model == REAL else 0.2
    return _drawn(name, shape) * spread + (1.0 if re.search(r"ln_\w+\.weight|scaling", name) else 0.0)


def rows(model: str) -> list[list[int]]:
    draw = np.random.RandomState(0)
    first = 1000 if model == REAL else 3  # where ordinary tokens begin
    return [draw.randint(first, first + 37, n).tolist() for n in (7, 4)]


def weights(row: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Of the sum whose gradients are compared."""
    return _drawn(f"row {row}", shape)


def _drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)).float()
