"""tritune: adapt one language model three ways, compare them honestly on your data, use the result.

Public names are imported on first use, so `import tritune` is quick and loads no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from tritune.methods import METHODS

#: public name -> module that defines it; the methods' configs come from their own table
_NAMES = {
    "adapt": "tritune.adapt",
    "compare": "tritune.compare",
    "Plan": "tritune.compare",
    "load_base": "tritune.models.load",
    "load": "tritune.adaptation",
    "classification": "tritune.tasks.classification",
    "TemplateSpec": "tritune.text.template",
    "Training": "tritune.run",
    "Split": "tritune.tasks.base",
    "TrituneError": "tritune.errors",
}


def _table() -> dict[str, str]:
    configs = (entry.partition(":") for entry in METHODS.values())
    return {**_NAMES, **{name: module for module, _, name in configs}}


def __getattr__(name: str) -> Any:
    module = _table().get(name)
    if module is None:
        raise AttributeError(f"module 'tritune' has no attribute '{name}'")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(_table())


class _Package(ModuleType):
    """Public names win over modules of the same name: importing `tritune.adapt` would put itself in the function's place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _table()):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
