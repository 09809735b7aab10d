"""What llama.cpp calls the weights of a base, and in which order it keeps their rows. Knows names, writes no file.

Only families whose tensors llama.cpp keeps one to one: fused and transposed ones it takes apart in ways of its own.
Shapes: E output width of a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tritune.errors import Problem
from tritune.exchange.format import Absent
from tritune.models.locate import gguf_file
from tritune.models.pretrained import Base

#: our model_type -> llama.cpp's architecture
ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


def family_problems(base: Base) -> list[Problem]:
    """Why this base's weights cannot be named."""
    if base.config.model_type in ARCHITECTURES:
        return []
    return [Problem("family", f"'{base.config.model_type}' is none of {', '.join(ARCHITECTURES)}")]


def names_of(base: Base) -> dict[str, str]:
    """Our name of every weight -> llama.cpp's, where it has one."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    wanted = ARCHITECTURES[base.config.model_type]
    architecture: MODEL_ARCH = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == wanted)
    table = get_tensor_name_map(architecture, base.config.num_hidden_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in base.parameters()}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def rows_order(base: Base, name: str, width: int) -> Tensor:
    """(E) which of our rows stands at each of llama.cpp's.

    On its architecture "llama" the two halves of a head that rotate together lie side by side, in q and k.
    """
    own = torch.arange(width)
    part = name.rpartition(".")[0].rpartition(".")[2]
    if ARCHITECTURES[base.config.model_type] != "llama" or part not in ("q_proj", "k_proj"):
        return own
    config = base.config
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    return own.view(heads, 2, width // heads // 2).transpose(1, 2).flatten()


def source_of(base: Base) -> Path:
    """The GGUF file that the base came from.

    Raises:
        Absent: it came from elsewhere.
    """
    found = None if base.located is None else gguf_file(base.located)
    if found is None:
        raise Absent(f"llama.cpp needs the base as a GGUF file, and {base.name} is none")
    return found
