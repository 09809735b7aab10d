"""What a plain Hugging Face folder must hold, and reading its JSON without running or believing it.

The first door for files that a stranger may have written: no pickle, no code named in a config, no file outside the
folder. Knows file names and JSON; knows no tensors and imports no model library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritune.errors import Mismatch, Problem, UnsupportedBase

Json = dict[str, Any]

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MARKER = "source.json"
"""In a folder converted from GGUF: what it was made from, what its source says, and the size of every file."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
MAX_JSON_BYTES = 256 << 20
"""Larger than any tokenizer.json known; a guard, not a limit anyone meets."""

# Keys through which a config.json chooses code: its own, a kernel of the hub's, or another attention function.
CODE_KEYS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "code_revision",
        "custom_pipelines",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "kernel_config",
        "name_or_path",
        "trust_remote_code",
        "use_kernels",
    }
)


def read_json(path: Path) -> Json:
    """A JSON object from a file.

    Raises:
        Mismatch: unreadable, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise Mismatch("A file is larger than any such file should be.", [Problem(str(path), "too large")])
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Mismatch("A file of the base cannot be read.", [Problem(str(path), str(error))]) from error
    if not isinstance(content, dict):
        problem = Problem(str(path), f"expected a JSON object, found {type(content).__name__}")
        raise Mismatch("A file of the base cannot be read.", [problem])
    return content


def safe_config(folder: Path) -> Json:
    """The folder's config.json without anything that chooses code, at every depth.

    Dropped: `auto_map` and its like, and keys that begin with an underscore (`_attn_implementation_internal` made
    some versions of transformers run code from the hub). Give the result to transformers instead of the file.

    Raises:
        Mismatch: there is no readable config.json.
        UnsupportedBase: no `model_type`, or the weights are quantised, so they can be neither trained nor packed.
    """
    config = _without_code(read_json(folder / "config.json"))
    if not isinstance(config.get("model_type"), str):
        raise UnsupportedBase(
            f"{folder / 'config.json'} names no model_type that is part of transformers. "
            "Code from inside a model folder is never run."
        )
    if config.get("quantization_config") is not None:
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UnsupportedBase(
            f"The weights in {folder} are quantised (method {method!r}). Use the original weights of this model, or "
            "its GGUF file, which is dequantised exactly."
        )
    return config


def _without_code(config: Mapping[str, Any]) -> Json:
    return {key: _inside(value) for key, value in config.items() if key not in CODE_KEYS and not key.startswith("_")}


def _inside(value: Any) -> Any:
    if isinstance(value, list):
        return [_inside(item) for item in value]
    return _without_code(value) if isinstance(value, dict) else value


def problems_of(folder: Path) -> list[Problem]:
    """Everything that keeps a folder from being used as a base; empty if nothing does."""
    problems = _config_problems(folder) + _weight_problems(folder)
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        wanted = ", or ".join(" with ".join(names) for names in TOKENIZERS)
        problems.append(Problem(str(folder), f"no tokenizer ({wanted})"))
    return problems


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, by name.

    Raises:
        Mismatch: there are none, or the index names files that are not there or lie elsewhere.
    """
    Mismatch.check(f"{folder} holds no usable weights.", _weight_problems(folder))
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    return [folder / name for name in _shards(folder)]


def _config_problems(folder: Path) -> list[Problem]:
    path = folder / "config.json"
    if not path.is_file():
        peft = " (this looks like a PEFT adapter, not a base)" if (folder / "adapter_config.json").is_file() else ""
        return [Problem(str(folder), f"no config.json{peft}")]
    try:
        read_json(path)
    except Mismatch as error:
        return list(error.problems)
    return []


def _weight_problems(folder: Path) -> list[Problem]:
    if (folder / WEIGHTS).is_file():
        return []
    if (folder / WEIGHTS_INDEX).is_file():
        return _shard_problems(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    what = f"no weights ({WEIGHTS}, or {WEIGHTS_INDEX} with its shards)"
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        what += (
            f"; there is only {', '.join(pickles[:3])}: pickle files can run code and are never loaded. "
            "Find a safetensors version of this model, or convert it where you trust its source"
        )
    elif ggufs := [name for name in names if name.endswith(".gguf")]:
        what += f"; for a GGUF file give the path of the file itself: {folder / ggufs[0]}"
    elif others := [name for name in names if name.endswith(".safetensors")]:
        what += f"; {others[0]} is under a name that nothing says is the model's"
    return [Problem(str(folder), what)]


def _shard_problems(folder: Path) -> list[Problem]:
    try:
        shards = _shards(folder)
    except Mismatch as error:
        return list(error.problems)
    return [Problem(str(folder / name), "missing shard") for name in shards if not (folder / name).is_file()]


def _shards(folder: Path) -> list[str]:
    path = folder / WEIGHTS_INDEX
    weight_map = read_json(path).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) and weight_map else []
    if not names or not all(isinstance(n, str) and n == Path(n).name and n.endswith(".safetensors") for n in names):
        problem = Problem(str(path), "weight_map must name .safetensors files beside it")
        raise Mismatch("The index of the weights cannot be used.", [problem])
    return names
