"""adapter-hub's folders (the package `adapters`): adapter_config.json beside adapter.safetensors or pytorch_adapter.bin.

Only families that the package itself patches by hand are exchanged: there we know where it acts. Checked against
adapters 1.3; `reference/with_adapters.py` runs it, in an environment of its own (it needs transformers 4.57).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange.adapter_hub.bottleneck import BottleneckCodec
from tritune.exchange.adapter_hub.codec import FAMILIES, NAME, Codec
from tritune.exchange.adapter_hub.lora import LoraCodec
from tritune.exchange.adapter_hub.older import with_older_config
from tritune.exchange.format import Format, Incoming
from tritune.exchange.weights import read_weights
from tritune.methods import method_of, method_with
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig
from tritune.store.files import read_json, write_json, write_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter.safetensors"
PICKLE = "pytorch_adapter.bin"
#: version whose keys are written
WRITTEN_FOR = "adapters.1.3.0"
NO_PLACE = "adapter-hub's format cannot hold this adaptation."

CODECS: tuple[Codec, ...] = (BottleneckCodec(), LoraCodec())


class AdapterHub(Format):
    name = "adapters"
    reference = "adapters"
    script = "with_adapters.py"

    def check(self, config: MethodConfig) -> None:
        Mismatch.check(NO_PLACE, _method_problems(config))

    def write(self, adaptation: Adaptation, folder: Path) -> None:
        Mismatch.check(NO_PLACE, [*_family_problems(adaptation.base), *_method_problems(adaptation.config)])
        codec = next(each for each in CODECS if type(adaptation.config) is each.Config)
        config, tensors = codec.encode(adaptation)
        base = adaptation.base
        document = {
            "config": dict(sorted(config.items())),
            "hidden_size": base.config.hidden_size,
            "model_class": type(base.model).__name__,
            "model_name": base.name,
            "model_type": base.config.model_type,
            "name": NAME,
            "version": WRITTEN_FOR,
        }
        write_json(folder / CONFIG, document)
        write_tensors(folder / TENSORS, tensors)

    def for_reference(self, folder: Path, base: Base, base_folder: Path, scratch: Path) -> tuple[Path, Path]:
        """The base with a config that the package's older transformers understands."""
        return folder, with_older_config(base_folder, scratch)

    def recognises(self, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and isinstance(_document(folder).get("config"), dict)

    def base_name(self, folder: Path) -> str | None:
        name = _document(folder).get("model_name")
        return name if isinstance(name, str) and name else None

    def read(self, folder: Path, base: Base) -> Incoming:
        document = _document(folder)
        config, notes = _as_trained(document)
        codec = next((each for each in CODECS if config.get("architecture") == each.architecture), None)
        problems = [*_family_problems(base), *_base_problems(document, base)]
        name, tensors = str(document.get("name")), _whole_names(read_weights(folder, TENSORS, PICKLE), base)
        if codec is None:
            known = ", ".join(repr(each.architecture) for each in CODECS)
            problems.append(Problem("config.architecture", f"{config.get('architecture')!r}, known: {known}"))
        elif base.config.model_type in FAMILIES:
            problems += codec.misfits(config, tensors, base, name)
        Mismatch.check(f"{folder} cannot be imported onto {base.name}.", problems)
        assert codec is not None
        found = codec.decode(config, tensors, base, name)
        return Incoming(found.config, found.tensors, (*notes, *found.notes))


def _as_trained(document: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The inner config, an error of the package's old versions undone: they trained LoRA as if alpha were r (PR 770)."""
    config = dict(document["config"])
    version = re.match(r"adapters\.(\d+)\.(\d+)", str(document.get("version")))
    if version is None or (int(version[1]), int(version[2])) >= (1, 1):
        return config, ()
    if config.get("architecture") != "lora" or config.get("r") == config.get("alpha"):
        return config, ()
    note = (
        f"alpha is read as r: before version 1.1 LoRA was trained with that scale, whatever alpha said ({version[0]})"
    )
    return {**config, "alpha": config.get("r")}, (note,)


def _document(folder: Path) -> dict[str, Any]:
    found = read_json(folder / CONFIG)
    return found if isinstance(found, dict) else {}


def _method_problems(config: MethodConfig) -> list[Problem]:
    if any(type(config) is each.Config for each in CODECS):
        return []
    known = ", ".join(method_with(each.Config).kind for each in CODECS)
    return [Problem("method", f"'{method_of(config).kind}' has no place there; these have: {known}")]


def _family_problems(base: Base) -> list[Problem]:
    if base.config.model_type in FAMILIES:
        return []
    return [Problem("family", f"'{base.config.model_type}' is none that adapter-hub patches: {', '.join(FAMILIES)}")]


def _base_problems(document: Mapping[str, Any], base: Base) -> list[Problem]:
    """What the folder says of its base."""
    wanted = {"model_type": base.config.model_type, "hidden_size": base.config.hidden_size}
    return [
        Problem(key, f"is {document[key]!r}, that of {base.name} is {value!r}")
        for key, value in wanted.items()
        if document.get(key) not in (None, value)
    ]


def _whole_names(tensors: Mapping[str, Tensor], base: Base) -> dict[str, Tensor]:
    """Names as of the model with its head: from the bare model they lack the first part."""
    prefix = f"{base.model.base_model_prefix}."
    if any(name.startswith(prefix) for name in tensors):
        return dict(tensors)
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


FORMAT = AdapterHub()
