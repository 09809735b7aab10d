"""What both sides of the comparison with adapter-hub share: tiny models, cases, weights and rows. Plain data and numpy.

Read by `record_adapter_hub.py` in an environment with the `adapters` package and by `test_adapter_hub.py` in ours; knows
neither. Weights are drawn by name from numpy's RandomState, whose numbers are the same in every version. A new case is one
line in CASES. LIVE says what is compared where the package can run, RECORDED which of it without.
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
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 4}),
    "gpt2": ("gpt2", {k: v for k, v in _SMALL.items() if k != "intermediate_size"} | {"n_inner": 24}),
    "qwen2": ("qwen2", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gpt-neox": ("gpt_neox", _SMALL),
    "gpt-neox-one-head": ("gpt_neox", {**_SMALL, "num_attention_heads": 1}),
    "phi3": (
        "phi3",
        {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"sliding_window": None, "rms_norm_eps": 1e-6},
    ),
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

#: what is changed of a case there. Every layer that loses the stream costs digits: where all thirty do, float32 is 1e-2 away
#: from float64 in the package as here. Three do, as in the tiny models.
ON_REAL: Mapping[str, Mapping[str, Any]] = {"no stream": {"leave_out": [*range(27)]}}

#: without the stream behind the adapter: the package's plug-in interface refuses that (its hooks stand in front of the sum)
NATIVE_ONLY = ("the stream as residual", "no stream")
#: families that are Llama with matrices stacked or biases here and there: where the package's own classes have to compute
#: their function, its Llama does, with their weights (`llama_value`)
AS_LLAMA: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen2": ("llama", {**_LLAMA, "attention_bias": True}),
    "phi3": ("llama", _LLAMA),
}

_POST_NORM_ONLY = (
    "added after the sum",
)  # elsewhere nothing follows the sum: refused here, an UnboundLocalError there
_PRE_NORM = tuple(name for name in CASES if name not in _POST_NORM_ONLY)
_PLUGGED = tuple(name for name in _PRE_NORM if name not in NATIVE_ONLY)
#: model -> the cases that it sees: all that mean something there and that the package can do
LIVE: Mapping[str, tuple[str, ...]] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "gpt2": _PRE_NORM,
    "qwen2": _PRE_NORM,
    # The package takes the thirds of a matrix of q, k and v for these three. GPT-NeoX's has them head by head, so that its
    # LoRA is LoRA of q, k and v only where there is one head.
    "gpt-neox": tuple(name for name in _PLUGGED if name not in LORAS),
    "gpt-neox-one-head": LORAS,
    "phi3": NATIVE_ONLY,
    # A base that norms after the sum always does, so that leaving the sum out means nothing (and is refused here).
    "opt-post-norm": (*_PLUGGED, *_POST_NORM_ONLY),
    REAL: _PRE_NORM,
}

_EVERYWHERE = ("seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "per layer", "own norm of the sum")
#: the part of LIVE that is recorded: all cases on one pre-norm and one post-norm family, some on others
RECORDED: Mapping[str, tuple[str, ...]] = {
    "llama": _PRE_NORM,
    "mistral": (*_EVERYWHERE, *LORAS),
    "gpt2": (*_EVERYWHERE, *NATIVE_ONLY, *LORAS),
    "qwen2": (*_EVERYWHERE, *LORAS),
    "gpt-neox": ("seq_bn", "double_seq_bn", "par_bn"),
    "opt-post-norm": LIVE["opt-post-norm"],
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
    "query_key_value": ("attn.q", "attn.k", "attn.v"),
    "up_proj": ("mlp.up",),
    "c_fc": ("mlp.up",),
    "fc1": ("mlp.up",),
    "dense_h_to_4h": ("mlp.up",),
    "down_proj": ("mlp.down",),
    "c_proj": ("mlp.down",),
    "fc2": ("mlp.down",),
    "dense_4h_to_h": ("mlp.down",),
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


def case_on(model: str, case: str) -> tuple[str, dict[str, Any]]:
    """adapter-hub's config of a case to begin with, and what is changed of it on this model."""
    preset, changes = CASES[case]
    return preset, {**changes, **(ON_REAL.get(case, {}) if model == REAL else {})}


def llama_value(name: str, shape: tuple[int, ...], model: str) -> torch.Tensor:
    """A weight of the Llama that computes the same as a model of AS_LLAMA, whose own weights are `base_value`s."""
    if name.endswith("o_proj.bias"):  # Qwen 2 has biases at q, k and v
        return torch.zeros(shape)
    found = re.search(r"\.([qkv]|gate|up)_proj\.weight$", name)
    if model != "phi3" or found is None:
        return base_value(name, shape)
    part = found[1]
    whole, height = ("qkv", 32) if part in "qkv" else ("gate_up", 48)
    first = {"q": 0, "k": 16, "v": 24, "gate": 0, "up": 24}[part]
    stacked = base_value(name.replace(f".{part}_proj", f".{whole}_proj"), (height, shape[1]))
    return stacked[first : first + shape[0]]


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
