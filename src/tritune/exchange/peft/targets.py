"""Which modules a PEFT config means: its rules for lists, patterns, exclusions and layers, by module name alone.

After `check_target_module_exists` and `get_pattern_key` of PEFT 0.21, where `re` patterns are anchored as they are here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether the module of this name is adapted."""
    if _named(config.get("exclude_modules"), name):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in (targets or ()):
        return True
    return _named(targets, name) and _in_layers(config, name)


def _named(given: Any, name: str) -> bool:
    """A pattern fits the whole name; an entry of a list is the name or how it ends."""
    if isinstance(given, str):
        return bool(given) and re.fullmatch(given, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in given or ())


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or ()
    forms = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([patterns] if isinstance(patterns, str) else patterns)]
    found = next(filter(None, (re.match(form, name) for form in forms or [r".*?\.[^.]*\.(\d+)\."])), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def by_pattern(patterns: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits the end of a name."""
    return next((value for form, value in patterns.items() if re.match(rf"(.*\.)?({form})$", name)), otherwise)


def bad_patterns(config: Mapping[str, Any]) -> Iterator[str]:
    """Keys whose patterns are no regular expressions. A list of module names holds none."""
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        given = config.get(key) or ()
        patterns = [given] if isinstance(given, str) else given if key.endswith("pattern") else ()
        if not all(map(_compiles, patterns)):
            yield key


def _compiles(pattern: Any) -> bool:
    try:
        re.compile(pattern)
    except (re.error, TypeError):
        return False
    return True
