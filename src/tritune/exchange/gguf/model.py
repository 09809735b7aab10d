"""A merged model as a GGUF file, for a base that came from one: its header and tokenizer are taken over as they are.

Weights that the adaptation changed, or that the base had quantised, are written in float32, all others with the bytes
they had. Only written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.format import Absent, Format
from tritune.exchange.gguf.copying import copy
from tritune.exchange.gguf.names import family_problems, names_of, rows_order, source_of
from tritune.models.pretrained import Base

FILE = "model.gguf"


class GgufModel(Format):
    name = "gguf"
    reference = "llama_cpp"
    script = "with_llama_cpp.py"
    whole = True

    def write(self, adaptation: Adaptation, folder: Path) -> None:
        from gguf import GGUFReader

        base = adaptation.base
        own = base.parameters()
        codes = {name: own[name] for name in own.quantised}  # the file has what they were quantised from
        merged = codes | adaptation.method.merge(adaptation.delta, base)
        source = _source(base)
        there = {tensor.name for tensor in GGUFReader(source).tensors}
        copy(source, folder / FILE, _changed(base, merged, there))

    def for_reference(self, folder: Path, base: Base, base_folder: Path, scratch: Path) -> tuple[Path, Path]:
        """Its weights in float32: beside quantised ones llama.cpp rounds activations too, which would hide mistakes."""
        copy(folder / FILE, scratch / FILE, dequantised=True)
        return scratch, base_folder


def _source(base: Base) -> Path:
    try:
        return source_of(base)
    except Absent:
        advice = "Export it with --format merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py."
        raise Mismatch(
            f"{base.name} did not come from a GGUF file, whose header would be needed.", hint=advice
        ) from None


def _changed(base: Base, merged: dict[str, Tensor], there: set[str]) -> dict[str, Any]:
    """Changed weights by llama.cpp's names, rows in its order.

    Raises:
        Mismatch: a changed weight has no place in the file.
    """
    problems = family_problems(base)
    names = names_of(base) if not problems else {}
    problems += [
        Problem(name, "has no place in the base's GGUF file")
        for name in merged
        if names and names.get(name) not in there
    ]
    problems += [
        Problem(name, "is a norm, which llama.cpp keeps plus one on this family")
        for name, weight in merged.items()
        if weight.ndim == 1 and base.config.model_type.startswith("gemma")
    ]
    Mismatch.check("This cannot be written as GGUF.", problems)
    return {
        names[name]: weight[rows_order(base, name, len(weight))].float().cpu().contiguous().numpy()
        for name, weight in merged.items()
    }


FORMAT = GgufModel()
