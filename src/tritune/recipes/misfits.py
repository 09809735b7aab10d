"""What is wrong with a document of settings, in words: every field that does not fit, unknown keys with the nearest one.

Knows documents by their types; no particular setting.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from tritune.errors import Problem
from tritune.methods import table
from tritune.spec import Frozen

UNKNOWN = "extra_forbidden"  # pydantic's name for a key that a document does not have
NO_SETTING = "there is no such setting"
#: pydantic puts the members of a union into an error's location
_MEMBERS = ("str", "int", "bool", "float", "tuple[", "literal[", "function-")


#: what a setting is called where it was given, by its path in the document ("rates.0")
Spelled = Callable[[str], str]


def inside(document: str) -> Spelled:
    """Settings of a file are called by their path in it."""
    return lambda path: f"{document}, '{path}'"


def misfits(kind: type[Frozen], data: Mapping[str, object], spelled: Spelled) -> list[Problem]:
    """Everything in a document that does not fit its kind."""
    try:
        kind.model_validate_json(_json(data))
    except ValidationError as error:
        return [_problem(kind, found, spelled) for found in _telling(error.errors(include_url=False))]
    return []


def fields_of(kind: type[Frozen]) -> str:
    """The fields of a document with their defaults, for a message."""
    defaults = {
        name: "no default" if f.is_required() else _json(f.get_default()) for name, f in kind.model_fields.items()
    }
    return ", ".join(f"{name} ({default})" for name, default in defaults.items()) or "none"


def method_misfits(names: Iterable[object], where: str) -> list[Problem]:
    """Names that are no method's, each with the nearest one."""
    return [
        Problem(where, f"'{name}' is not a method{nearest(str(name), table())}; known: {', '.join(table())}")
        for name in names
        if name not in table()
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where something known is close, or nothing."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _telling(errors: Iterable[Any]) -> list[Any]:
    """One error per place. A value that fits no member of a union has one per member; the one deepest inside tells most."""
    by_place: dict[tuple[str, ...], Any] = {}
    for error in errors:
        by_place.setdefault(_place(error), error)
    deepest = {place[0]: 0 for place in by_place if place}
    for place in by_place:
        deepest[place[0]] = max(deepest[place[0]], len(place))
    return [error for place, error in by_place.items() if len(place) == deepest[place[0]]]


def _place(error: Any) -> tuple[str, ...]:
    parts = [str(part) for part in error["loc"]]
    return tuple(part for i, part in enumerate(parts) if not i or not part.startswith(_MEMBERS))


def _problem(kind: type[Frozen], error: Any, spelled: Spelled) -> Problem:
    place = _place(error)
    *path, key = place
    where = spelled(".".join(place))
    if error["type"] == UNKNOWN:
        known = _document_at(kind, path).model_fields
        return Problem(where, f"{NO_SETTING}{nearest(key, known)}")
    return Problem(where, f"{error['msg']}, found {_json(error['input'])}")


def _document_at(kind: type[Frozen], path: Iterable[str]) -> type[Frozen]:
    """The kind of document that a path leads to; a union member's name in the path leads nowhere new."""
    for part in path:
        field = kind.model_fields.get(part)
        members = get_args(field.annotation) if field else ()
        kind = next((m for m in members if isinstance(m, type) and issubclass(m, Frozen)), kind)
    return kind


def _json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, default=str)
