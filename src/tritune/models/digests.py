"""What a base is, by content: digests of weights, config and tokenizer that do not change when files are rewritten.

Sharding, the order of a safetensors header and the version of transformers that saved a config do not count; a changed
weight does. Reads bytes and JSON only: no torch, nothing is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tritune.errors import Mismatch, Problem, StorageError
from tritune.models.folder import MARKER, TOKENIZERS, read_json, weight_files
from tritune.packaged import CHUNK, cache_dir, sha256_of
from tritune.spec import Digests, digest

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

# Keys of config.json that record how a model was saved or is to be run, not what it computes.
NOT_COMPUTATION = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

# Keys of tokenizer_config.json that change which ids a text becomes. The chat template has a digest of its own elsewhere.
CHANGES_IDS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "additional_special_tokens",
    "bos_token",
    "eos_token",
    "extra_special_tokens",
    "legacy",
    "tokenizer_class",
    "unk_token",
)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor's bytes lie: `start` and `size` in bytes within `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def digests(folder: Path) -> Digests:
    """The digests of a plain Hugging Face folder. The weights' one is remembered in the cache.

    Raises:
        Mismatch: a file is missing or malformed.
    """
    files = weight_files(folder)
    weights = _remembered("weights", files, lambda: weights_digest(files))
    return Digests(weights=weights, config=config_digest(folder), tokenizer=tokenizer_digest(folder))


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, remembered in the cache until the file changes."""
    return _remembered("file", [path], lambda: sha256_of(path))


def weights_digest(files: Sequence[Path]) -> str:
    """sha256 (hex) over every tensor's name, dtype, shape and bytes, in the order of names.

    Raises:
        Mismatch: not a whole safetensors file, or one name in two files.
    """
    tensors: dict[str, Stored] = {}
    for path in files:
        for name, stored in read_header(path).items():
            if name in tensors:
                problem = Problem(str(path), f"tensor {name!r} is in {tensors[name].path.name} too")
                raise Mismatch("The weights are ambiguous.", [problem])
            tensors[name] = stored
    sha = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        sha.update(json.dumps([name, stored.dtype, list(stored.shape)], separators=(",", ":")).encode() + b"\n")
        with stored.path.open("rb") as file:
            _update(sha.update, file, stored)
    return sha.hexdigest()


def _update(update: Callable[[bytes], None], file: BinaryIO, stored: Stored) -> None:
    file.seek(stored.start)
    left = stored.size
    while left:
        block = file.read(min(CHUNK, left))
        if not block:
            raise Mismatch("A file became shorter while it was read.", [Problem(str(stored.path), "truncated")])
        update(block)
        left -= len(block)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name, without reading them.

    Raises:
        Mismatch: the header does not describe exactly the bytes that are there.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes is not possible")
            header = json.loads(file.read(length))
        tensors = {name: _stored(path, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        held = path.stat().st_size - 8 - length
        if held != sum(stored.size for stored in tensors.values()):
            raise ValueError(f"the header describes other bytes than the {held} that follow it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = Problem(str(path), f"{type(error).__name__}: {error}")
        raise Mismatch("This is not a whole safetensors file.", [problem]) from error
    return tensors


def _stored(path: Path, entry: Mapping[str, Any], data: int) -> Stored:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(size) for size in entry["shape"])
    stored = Stored(path, str(entry["dtype"]), shape, data + begin, end - begin)
    bits = BITS.get(stored.dtype)
    if begin < 0 or stored.size < 0 or (bits and stored.size * 8 != math.prod(shape) * bits):
        raise ValueError("a tensor's shape and place do not agree")
    return stored


def config_digest(folder: Path) -> str:
    """sha256 (hex) of what config.json says of the computation. `null` counts as absent, 1.0 as 1."""
    if stated := _stated_by_source(folder, "config", ("config.json",)):
        return stated
    return digest(_canonical(read_json(folder / "config.json")))


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _canonical(item)
            for key, item in value.items()
            if item is not None and key not in NOT_COMPUTATION and not key.startswith("_")
        }
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return int(value) if value.is_integer() else value
    return value


def tokenizer_digest(folder: Path) -> str:
    """sha256 (hex) of what decides which ids a text becomes."""
    if stated := _stated_by_source(folder, "tokenizer", ("tokenizer.json", "tokenizer_config.json")):
        return stated
    content: dict[str, Any] = {"settings": _settings(folder)}
    if (folder / "tokenizer.json").is_file():
        content["tokenizer.json"] = read_json(folder / "tokenizer.json")
    else:
        names = next((names for names in TOKENIZERS if all((folder / name).is_file() for name in names)), ())
        content |= {name: sha256_of(folder / name) for name in names}
    return digest(content)


def _stated_by_source(folder: Path, what: str, files: Sequence[str]) -> str | None:
    """The digest that the converter noted, as long as the files are the ones it wrote.

    How transformers spells a config differs by its version; what the GGUF file says does not, and an adaptation must
    fit the same base on another machine.
    """
    if not (folder / MARKER).is_file():
        return None
    marker = read_json(folder / MARKER)
    stated, sums = marker.get(what), marker.get("sha256")
    if not isinstance(stated, str) or not isinstance(sums, dict):
        return None
    if any(not (folder / name).is_file() or sha256_of(folder / name) != sums.get(name) for name in files):
        return None
    return stated


def _settings(folder: Path) -> dict[str, Any]:
    """Special tokens and their use: tokenizer_config.json, over the older special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= {key: value for key, value in read_json(folder / name).items() if value is not None}
    return {key: _text(settings[key]) for key in CHANGES_IDS if key in settings}


def _text(value: Any) -> Any:
    """A token is written as its text, or as an object that holds its text."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _remembered(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave for the same files before. The cache is a convenience: no failure of it counts."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    key = digest([kind, *([path, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for path, s in stats)])
    try:
        memory = cache_dir() / "digests" / f"{key}.txt"
        known = memory.read_text(encoding="ascii").strip()
    except (StorageError, OSError, ValueError):
        known = ""
    if len(known) == 64 and set(known) <= set("0123456789abcdef"):
        return known
    value = compute()
    _remember(key, value)
    return value


def _remember(key: str, value: str) -> None:
    try:
        folder = cache_dir() / "digests"
        folder.mkdir(exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, prefix="tmp-")
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(value + "\n")
        Path(partial).replace(folder / f"{key}.txt")
    except (StorageError, OSError):
        return
