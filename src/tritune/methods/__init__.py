"""The table of methods. Adding one = one file beside this one + one line here; everything else derives from it.

Names are known without importing torch; a method's module is imported when it is asked for.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tritune.errors import Mismatch, Problem

if TYPE_CHECKING:
    from tritune.methods.base import Method
    from tritune.spec import MethodConfig

#: kind -> "module:config class". The module's `METHOD` is the method itself.
METHODS: dict[str, str] = {
    "full": "tritune.methods.full:Full",
    "ptuning": "tritune.methods.ptuning:PTuning",
    "prefix": "tritune.methods.prefix:Prefix",
    "bottleneck": "tritune.methods.bottleneck:Bottleneck",
    "ia3": "tritune.methods.ia3:IA3",
    "lora": "tritune.methods.lora:LoRA",
}


def method(kind: str) -> Method[Any]:
    """The method of this name.

    Raises:
        Mismatch: unknown name; offers the nearest.
    """
    if kind not in METHODS:
        near = difflib.get_close_matches(kind, METHODS, n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise Mismatch(
            "Unknown method.", [Problem(f"'{kind}'", "is not in the table")], f"{guess}Known: {', '.join(METHODS)}."
        )
    found: Method[Any] = import_module(METHODS[kind].partition(":")[0]).METHOD
    return found


def method_of(config: MethodConfig) -> Method[Any]:
    """The method that a config belongs to."""
    for kind in METHODS:
        if type(config) is method(kind).Config:
            return method(kind)
    raise Mismatch("This config belongs to no method.", [Problem(type(config).__name__, "is not in the table")])
