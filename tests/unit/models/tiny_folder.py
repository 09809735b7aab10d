"""Writes a Hugging Face folder of a few hundred bytes: no model, but whole safetensors files and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]


def tensors() -> Tensors:
    """Tensors of several dtypes and shapes, a scalar and an empty one among them."""
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 4), dtype=np.float32),
        "b.weight": rng.standard_normal((5,)).astype(np.float16),
        "c.scale": np.array(1.5, dtype=np.float32),
        "d.steps": np.arange(7, dtype=np.int64),
        "e.empty": np.zeros((0, 4), dtype=np.float32),
    }


def write_json(path: Path, content: object) -> None:
    """One JSON file."""
    path.write_text(json.dumps(content), encoding="utf-8")


def write(folder: Path, shards: int = 1) -> Path:
    """Write the folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llama", "hidden_size": 4, "dtype": "float32"})
    write_json(folder / "tokenizer.json", {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}}})
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})
    weights = tensors()
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: names[i % shards] for i, name in enumerate(weights)}
    for shard in names:
        save_file({name: weights[name] for name, place in places.items() if place == shard}, folder / shard)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    return folder
