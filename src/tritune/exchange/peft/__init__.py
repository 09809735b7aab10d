"""PEFT's folders: adapter_config.json beside adapter_model.safetensors. Which of its types is which method: a table.

A new type is one codec (a file here) and one line in CODECS. Checked against PEFT 0.21; `reference/with_peft.py` runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.format import Format, Incoming
from tritune.exchange.peft.codec import Codec, common
from tritune.exchange.peft.ia3 import Ia3Codec
from tritune.exchange.peft.lora import LoraCodec
from tritune.exchange.peft.prefix import PrefixCodec
from tritune.exchange.peft.prompt import PromptCodec
from tritune.exchange.weights import read_weights
from tritune.methods import method_of, method_with
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig
from tritune.store.files import read_json, write_json, write_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

CODECS: tuple[Codec, ...] = (LoraCodec(), PromptCodec(), PrefixCodec(), Ia3Codec())


class Peft(Format):
    name = "peft"
    reference = "peft"
    script = "with_peft.py"

    def check(self, config: MethodConfig) -> None:
        _codec_for(config)

    def write(self, adaptation: Adaptation, folder: Path) -> None:
        codec = _codec_for(adaptation.config)
        config, tensors = codec.encode(adaptation)
        write_json(folder / CONFIG, dict(sorted({**common(adaptation.base), **config}.items())))
        write_tensors(folder / TENSORS, tensors)

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and "peft_type" in _config(folder)

    def base_name(self, folder: Path) -> str | None:
        name = _config(folder).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def read(self, folder: Path, base: Base) -> Incoming:
        config = _config(folder)
        kind = config.get("peft_type")
        codec = next((each for each in CODECS if kind in each.types), None)
        if codec is None:
            known = ", ".join(name for each in CODECS for name in each.types)
            raise Mismatch(f"{folder} cannot be imported.", [Problem("peft_type", f"{kind!r}, known: {known}")])
        return codec.decode(config, read_weights(folder, TENSORS, PICKLE), base, str(folder))


def _codec_for(config: MethodConfig) -> Codec:
    """
    Raises:
        Mismatch: PEFT has no such method.
    """
    codec = next((each for each in CODECS if type(config) is each.Config), None)
    if codec is None:
        known = ", ".join(method_with(each.Config).kind for each in CODECS)
        raise Mismatch(f"PEFT's format has no place for '{method_of(config).kind}'.", hint=f"It has one for: {known}.")
    return codec


def _config(folder: Path) -> dict[str, Any]:
    found = read_json(folder / CONFIG)
    return found if isinstance(found, dict) else {}


FORMAT = Peft()
