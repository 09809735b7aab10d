"""The table of methods. Adding one = one file beside this one + one line here; everything else derives from it.

Names are known without importing torch; a method's module is imported when it is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
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
#: the same for methods that are made of others. What of is a choice, so a comparison of all methods leaves them out.
COMPOSED: dict[str, str] = {
    "stack": "tritune.methods.stack:Stack",
    "fusion": "tritune.methods.fusion:Fusion",
}


def table() -> dict[str, str]:
    """Every method there is, of one part or of several."""
    return {**METHODS, **COMPOSED}


def method(kind: str) -> Method[Any]:
    """The method of this name.

    Raises:
        Mismatch: unknown name; offers the nearest.
    """
    known = table()
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise Mismatch(
            "Unknown method.", [Problem(f"'{kind}'", "is not in the table")], f"{guess}Known: {', '.join(known)}."
        )
    found: Method[Any] = import_module(known[kind].partition(":")[0]).METHOD
    return found


def not_alone(kind: str, settings: Mapping[str, object]) -> list[Problem]:
    """Why a method that is made of others cannot be trained with these settings: of which ones is not said, or they have to
    be finished."""
    its = method(kind)
    needed = {name for name, field in its.Config.model_fields.items() if field.is_required()}
    return [Problem(kind, its.made_by)] if its.made_by and (its.of_finished or needed - settings.keys()) else []


def method_of(config: MethodConfig) -> Method[Any]:
    """The method that a config belongs to."""
    return method_with(type(config))


def method_with(kind_of_config: type[MethodConfig]) -> Method[Any]:
    """The method whose configs are of this class."""
    for kind in table():
        if kind_of_config is method(kind).Config:
            return method(kind)
    raise Mismatch("This config belongs to no method.", [Problem(kind_of_config.__name__, "is not in the table")])
