"""Settings and origins of a record as named facts for a page: keys in words, values as text, nesting kept.

Keys that the dictionary does not know are shown as they are; keys that are the user's own labels always are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tritune.report import units
from tritune.report.words import Lang, words

#: below this key stand names that the user chose
USERS_OWN = "labels"
#: a size in memory
BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Fact:
    """A name with either a value or further facts."""

    name: str
    value: str = ""
    parts: tuple[Fact, ...] = ()


def facts(document: Mapping[str, object], lang: Lang, *, translate: bool = True) -> tuple[Fact, ...]:
    """The facts of a document, in its order."""
    texts = words(lang)
    return tuple(
        _fact(key, value, texts.get(f"fact_{key}", key) if translate else key, lang) for key, value in document.items()
    )


def _fact(key: str, value: object, name: str, lang: Lang) -> Fact:
    if isinstance(value, Mapping) and value:
        return Fact(name, parts=facts(value, lang, translate=key != USERS_OWN))
    if key == BYTES and isinstance(value, int):
        return Fact(name, units.size(value, lang))
    return Fact(name, _shown(value, lang))


def _shown(value: object, lang: Lang) -> str:
    texts = words(lang)
    if value is None or value == "" or value == {}:
        return texts["dash"]
    if isinstance(value, bool):
        return texts["yes" if value else "no"]
    if isinstance(value, float):
        return units.number(f"{value:.6g}", lang)
    if isinstance(value, (list, tuple)):
        return ("; " if lang == "ru" else ", ").join(_shown(part, lang) for part in value) or texts["dash"]
    return str(value)
