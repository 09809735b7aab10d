"""A LoRA as a GGUF adapter: `llama-cli -m base.gguf --lora adapter.gguf`. Written, and read back to check ourselves.

llama.cpp multiplies B A by alpha / rank, the rank being B's own and alpha that of the whole file.
Shapes: r rank, D and E input and output width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.format import Format, Incoming
from tritune.exchange.gguf.copying import copy
from tritune.exchange.gguf.names import ARCHITECTURES, family_problems, names_of, rows_order, source_of
from tritune.exchange.lora_terms import alpha_of, gathered, largest, plain_problems, terms_of
from tritune.exchange.modules import LowRank, linear_modules
from tritune.methods import method_of
from tritune.methods.lora import LoRA
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig

FILE = "adapter.gguf"
NO_PLACE = "llama.cpp takes no such adapter."
ELSEWHERE = "A whole model (merged, gguf) or PEFT's format may hold it."
#: llama.cpp's words
ADAPTER, KIND, ALPHA = "adapter", "lora", "adapter.lora.alpha"


class GgufLora(Format):
    name = "gguf-lora"
    reference = "llama_cpp"
    script = "with_llama_cpp.py"

    def check(self, config: MethodConfig) -> None:
        Mismatch.check(NO_PLACE, _method_problems(config), ELSEWHERE)

    def write(self, adaptation: Adaptation, folder: Path) -> None:
        from gguf import GGUFWriter

        base = adaptation.base
        method = _method_problems(adaptation.config)
        Mismatch.check(NO_PLACE, [*family_problems(base), *(method or plain_problems(adaptation))], ELSEWHERE)
        writer = GGUFWriter(folder / FILE, ARCHITECTURES[base.config.model_type])
        writer.add_type(ADAPTER)
        writer.add_string("adapter.type", KIND)
        placed = _placed(adaptation)
        rank, scale = largest(term for *_, term in placed)
        alpha = float(alpha_of(scale, rank, stabilised=False))
        writer.add_float32(ALPHA, alpha)
        writer.add_string("general.name", f"LoRA of {base.name}")
        for theirs, order, own in placed:
            term = own.as_of(own.rank, alpha / own.rank)
            writer.add_tensor(f"{theirs}.lora_a", term.A.float().contiguous().numpy())
            writer.add_tensor(f"{theirs}.lora_b", term.B[order].float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def for_reference(self, folder: Path, base: Base, base_folder: Path, scratch: Path) -> tuple[Path, Path]:
        """The base's weights in float32: beside quantised ones llama.cpp rounds activations too, hiding mistakes."""
        copy(source_of(base), scratch / "base.gguf", dequantised=True)
        return folder, scratch / "base.gguf"

    def read(self, folder: Path, base: Base) -> Incoming:
        from gguf import GGUFReader

        reader = GGUFReader(folder / FILE)
        alpha = float(reader.fields[ALPHA].contents())
        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
        terms: dict[str, LowRank] = {}
        names = names_of(base)
        for path, module in linear_modules(base).items():
            theirs = names[f"{path}.weight"]
            if f"{theirs}.lora_a" in tensors:
                A_rD, B_Er = tensors.pop(f"{theirs}.lora_a"), tensors.pop(f"{theirs}.lora_b")
                back = torch.argsort(rows_order(base, f"{path}.weight", module.d_out))
                terms[module.sites[0][0].key] = LowRank(A_rD, B_Er[back], alpha / A_rD.shape[0])
        Mismatch.check(f"{folder} does not fit {base.name}.", [Problem(name, "no place has it") for name in tensors])
        return gathered(terms, base, stabilised=False)


def _method_problems(config: MethodConfig) -> list[Problem]:
    return [] if isinstance(config, LoRA) else [Problem("method", f"'{method_of(config).kind}' is no LoRA")]


def _placed(adaptation: Adaptation) -> list[tuple[str, Tensor, LowRank]]:
    """llama.cpp's name, the order of its rows and the term, of every adapted matrix."""
    base, terms = adaptation.base, terms_of(adaptation)
    names = names_of(base)
    return [
        (names[f"{path}.weight"], rows_order(base, f"{path}.weight", module.d_out), terms[site.key])
        for path, module in linear_modules(base).items()
        for site, _ in module.sites
        if site.key in terms
    ]


FORMAT = GgufLora()
