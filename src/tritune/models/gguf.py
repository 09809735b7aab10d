"""GGUF file -> plain Hugging Face folder (config.json, model.safetensors, tokenizer.json, ...), once.

transformers reads the config and the weights; the tokenizer is ours, since it must equal llama.cpp's exactly. Weights
are stored in fp32: that is what a quantised block means (scale times integer, plus minimum), and bf16 would round it a
second time. Knows nothing of where the file came from or where the folder goes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritune.errors import Mismatch, Problem, StorageError, UnsupportedBase
from tritune.spec import digest

CONVERTER_VERSION = 1
"""Raised whenever the same file would give another folder."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the GGUF file itself says, whatever version of transformers reads it.

    Attributes:
        license: as the file states it, if it does.
        config: sha256 (hex) of the architecture's keys.
        tokenizer: sha256 (hex) of the tokenizer's keys and the version of this converter.
    """

    license: str | None
    config: str
    tokenizer: str


def convert(gguf_file: Path, into: Path) -> Facts:
    """Write the model of a GGUF file as a Hugging Face folder. Takes seconds to a minute, and fp32 memory.

    Args:
        gguf_file: the file; one file, not a shard of several.
        into: an existing empty folder. On an error its content is undefined.

    Raises:
        Mismatch: not a GGUF file.
        UnsupportedBase: a family, a quantisation or a tokenizer that cannot be converted exactly.
        StorageError: the weights cannot be written.
    """
    from safetensors import SafetensorError

    from tritune.models import gguf_tokenizer

    metadata = read_metadata(gguf_file)
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedBase(f"{gguf_file} is one part of a model in several GGUF files; join them first.")
    tokenizer, settings = gguf_tokenizer.build(metadata)
    tokenizer.save(str(into / "tokenizer.json"))
    _write_json(into / "tokenizer_config.json", settings)
    model = _load(gguf_file)
    _set_special_ids(model, metadata)
    try:
        with _quiet():
            model.save_pretrained(into)
    except SafetensorError as error:
        raise StorageError(f"The weights could not be written to {into}: {error}") from error
    _clean_config(into / "config.json")
    return _facts(metadata)


def _facts(metadata: dict[str, Any]) -> Facts:
    architecture, license_ = metadata["general.architecture"], metadata.get("general.license")
    config = {key: value for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    tokenizer = {
        key: value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.") and key != "tokenizer.ggml.padding_token_id"
    }
    return Facts(
        license=license_ if isinstance(license_, str) else None,
        config=digest([architecture, config]),
        tokenizer=digest([CONVERTER_VERSION, tokenizer]),
    )


def read_metadata(gguf_file: Path) -> dict[str, Any]:
    """The keys and values of a GGUF file's header.

    Raises:
        Mismatch: not a GGUF file, or a truncated one.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf_file)
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise Mismatch("This is not a complete GGUF file.", [Problem(str(gguf_file), str(error))]) from error


def _load(gguf_file: Path) -> Any:
    """The model in fp32, every weight of it from the file."""
    import torch
    import transformers

    # Where the `kernels` package is present, newer versions keep quantised blocks unless told otherwise.
    gguf_config = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": gguf_config(dequantize=True)} if gguf_config else {}
    try:
        with _quiet():
            loader: Any = transformers.AutoModelForCausalLM
            model, info = loader.from_pretrained(
                gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, output_loading_info=True, **options
            )
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise UnsupportedBase(f"{gguf_file}: transformers cannot read this GGUF file: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    wrong["not fp32"] = [name for name, tensor in model.state_dict().items() if tensor.dtype != torch.float32]
    if found := [f"{kind}: {', '.join(names[:5])}" for kind, names in wrong.items() if names]:
        raise UnsupportedBase(f"{gguf_file} does not fill this model exactly: {'; '.join(found)}")
    # Nothing is quantised any more, but these marks make save_pretrained refuse.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _set_special_ids(model: Any, metadata: dict[str, Any]) -> None:
    """The special ids that the file states; generation stops at the end of a text and at the end of a turn."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = ids["bos"], ids["eos"], ids["padding"]
    ends = list(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None))
    if len(ends) > 1:
        model.generation_config.eos_token_id = ends


def _clean_config(path: Path) -> None:
    """Drop what transformers' reader leaves behind, such as `_model_name_or_path`."""
    config = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {key: value for key, value in config.items() if not key.startswith("_")})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars and remarks off the screen while converting."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # parts of it are untyped
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
