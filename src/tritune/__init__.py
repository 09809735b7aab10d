"""tritune: adapt one language model three ways, compare them honestly on your data, use the result.

Public names are imported on first use, so `import tritune` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tritune.methods import table

#: public name -> module that defines it, of another name; the methods' configs come from their own table
_NAMES = {
    "adapt": "tritune.trial",
    "compare": "tritune.comparison",
    "Plan": "tritune.comparison",
    "load_base": "tritune.models.load",
    "load": "tritune.adaptation",
    "stack": "tritune.composition.stacking",
    "merge": "tritune.composition.merging",
    "fuse": "tritune.composition.fusing",
    "classification": "tritune.tasks.classification",
    "TemplateSpec": "tritune.text.template",
    "Training": "tritune.run",
    "Split": "tritune.tasks.base",
    "TrituneError": "tritune.errors",
}


def _table() -> dict[str, str]:
    configs = (entry.partition(":") for entry in table().values())
    return {**_NAMES, **{name: module for module, _, name in configs}}


def __getattr__(name: str) -> Any:
    module = _table().get(name)
    if module is None:
        raise AttributeError(f"module 'tritune' has no attribute '{name}'")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(_table())
