"""What is wrong with a document of settings, in words: every field that does not fit, unknown keys with the nearest one.

Knows documents by their types; no particular setting.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from tritune.errors import Problem

UNKNOWN, MISSING, OURS = "extra_forbidden", "missing", "value_error"  # pydantic's names for kinds of errors
NO_SETTING = "there is no such setting"
#: pydantic puts the members of a union into an error's location
_MEMBERS = ("str", "int", "bool", "float", "tuple[", "literal[", "function-")

#: what a setting is called where it was given, by its path in the document ("rates.0"); "": the document as a whole
Spelled = Callable[[str], str]


def inside(document: str) -> Spelled:
    """Settings of a file are called by their path in it."""
    return lambda path: f"{document}, '{path}'" if path else document


def misfits(kind: type[BaseModel], data: Mapping[str, object], spelled: Spelled) -> list[Problem]:
    """Everything in a document that does not fit its kind."""
    try:
        kind.model_validate_json(shown(data))
    except ValidationError as error:
        return problems_of(kind, error, spelled)
    return []


def problems_of(kind: type[BaseModel], error: ValidationError, spelled: Spelled) -> list[Problem]:
    """What pydantic found, one problem per place."""
    return [_problem(kind, found, spelled) for found in _telling(error.errors(include_url=False))]


def fields_of(kind: type[BaseModel]) -> str:
    """The fields of a document with their defaults, for a message."""
    fields = kind.model_fields.items()
    defaults = {name: "no default" if f.is_required() else shown(f.get_default()) for name, f in fields}
    return ", ".join(f"{name} ({default})" for name, default in defaults.items()) or "none"


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" where something known is close, or nothing."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def shown(data: object) -> str:
    """A value as JSON; what JSON does not know, as Python writes it."""
    return json.dumps(data, ensure_ascii=False, default=str)


def _telling(errors: Iterable[Any]) -> list[Any]:
    """One error per place. A value that fits no member of a union has one per member; the one deepest inside tells most."""
    by_place: dict[tuple[str, ...], Any] = {}
    for error in errors:
        by_place.setdefault(_place(error), error)
    deepest: dict[tuple[str, ...], int] = {}
    for place in by_place:
        deepest[place[:1]] = max(deepest.get(place[:1], 0), len(place))
    return [error for place, error in by_place.items() if len(place) == deepest[place[:1]]]


def _place(error: Any) -> tuple[str, ...]:
    parts = [str(part) for part in error["loc"]]
    return tuple(part for i, part in enumerate(parts) if not i or not part.startswith(_MEMBERS))


def _problem(kind: type[BaseModel], error: Any, spelled: Spelled) -> Problem:
    place = _place(error)
    where = spelled(".".join(place))
    if error["type"] == UNKNOWN:
        known = _document_at(kind, place[:-1]).model_fields
        return Problem(where, f"{NO_SETTING}{nearest(place[-1], known)}")
    if error["type"] == MISSING:
        return Problem(where, "not given")
    what = str(error["ctx"]["error"]) if error["type"] == OURS else error["msg"]
    # What contradicts each other is said of the whole document, which nobody wants to read again.
    return Problem(where, f"{what}, found {shown(error['input'])}" if place else what)


def _document_at(kind: type[BaseModel], path: Iterable[str]) -> type[BaseModel]:
    """The kind of document that a path leads to; a union member's name in the path leads nowhere new."""
    for part in path:
        field = kind.model_fields.get(part)
        members = get_args(field.annotation) if field else ()
        kind = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), kind)
    return kind
