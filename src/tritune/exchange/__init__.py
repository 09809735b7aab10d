"""The table of exchange formats: how adaptations go out to other packages and come in from them.

Adding one = one file beside this one + one line here. Names are known without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tritune.errors import Mismatch, Problem

if TYPE_CHECKING:
    from tritune.exchange.format import Format

#: name -> the module whose `FORMAT` it is
FORMATS: dict[str, str] = {
    "peft": "tritune.exchange.peft",
    "adapters": "tritune.exchange.adapter_hub",
    "merged": "tritune.exchange.merged",
    "gguf": "tritune.exchange.gguf.model",
    "gguf-lora": "tritune.exchange.gguf.lora",
}


def format_named(name: str) -> Format:
    """The format of this name.

    Raises:
        Mismatch: unknown name.
    """
    if name not in FORMATS:
        problem = Problem(f"'{name}'", "is not in the table")
        raise Mismatch("Unknown exchange format.", [problem], f"Known: {', '.join(FORMATS)}.")
    found: Format = import_module(FORMATS[name]).FORMAT
    return found


def recognise(folder: Path) -> Format:
    """The format that a folder is written in.

    Raises:
        Mismatch: none of those that can be read.
    """
    for name in FORMATS:
        if format_named(name).recognises(folder):
            return format_named(name)
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    what = f"holds {', '.join(there[:8]) or 'nothing'}" if folder.is_dir() else "is no folder"
    raise Mismatch("No adaptation of a known format is here.", [Problem(str(folder), what)], _hint(folder))


def _hint(folder: Path) -> str:
    if (folder / "manifest.json").is_file():
        return "This is tritune's own form already: use it as it is."
    if (folder / "config.json").is_file():
        return "This is a whole model: use it with --base."
    return "PEFT and adapter-hub write an adapter_config.json beside the weights."
