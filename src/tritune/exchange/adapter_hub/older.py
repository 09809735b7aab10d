"""A base's folder as the transformers that adapter-hub's package needs (4.57) reads it.

Since version 5 how positions rotate stands in one entry of config.json, "rope_parameters". Version 4 does not know that
entry: it says nothing and rotates by its defaults, which is another model. Knows folders, no adaptation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tritune.store.files import read_json, write_json

CONFIG = "config.json"


def with_older_config(base: Path, folder: Path) -> Path:
    """Fill an empty folder: the base's own files, linked, and its config with the entries of version 4."""
    for path in base.iterdir():
        if path.name != CONFIG:
            (folder / path.name).symlink_to(path.absolute())
    write_json(folder / CONFIG, older(read_json(base / CONFIG)))
    return folder


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, said both ways."""
    rope = dict(config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    said = {} if theta is None else {"rope_theta": theta}
    if rope.get("rope_type", "default") != "default":
        said["rope_scaling"] = rope
    return {**config, **said}
