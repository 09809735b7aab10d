"""Documents: frozen, strict, JSON-able. The vocabulary every other module speaks. No torch here.

`Frozen` is the base of every config and every record on disk; `digest` names a document by its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from tritune.errors import BadSettings, Mismatch, Problem
from tritune.misfits import NO_SETTING, fields_of, problems_of


class Frozen(BaseModel):
    """An immutable document. An unknown key is an error; a number is never made out of a string."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="null")

    @classmethod
    def read(cls, data: object, where: str) -> Self:
        """Build from plain data (of a JSON or YAML file).

        Raises:
            Mismatch: with every field that does not fit.
        """
        try:
            return cls.model_validate_json(json.dumps(data))
        except ValidationError as error:
            problems = [
                Problem(f"{where}, field '{'.'.join(map(str, e['loc'])) or '(whole document)'}'", e["msg"])
                for e in error.errors(include_url=False)
            ]
            raise Mismatch(f"This is not a valid {cls.__name__}.", problems) from None


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # it has no public name


class _Made(ModelMetaclass):
    """Errors of a constructor in our words. What reads documents does not come by here."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        try:
            return super().__call__(*args, **settings)
        except ValidationError as error:
            kind = cast("type[BaseModel]", cls)
            problems = problems_of(kind, error, lambda path: path or cls.__name__)
            unknown = any(problem.what.startswith(NO_SETTING) for problem in problems)
            hint = f"Settings, with defaults: {fields_of(kind)}." if unknown else ""
            raise BadSettings(f"{cls.__name__} cannot be made of these settings.", problems, hint) from None


class Given(Frozen, metaclass=_Made):
    """A document that people make in Python.

    Raises:
        BadSettings: from the constructor, with every setting that does not fit.
    """


#: the forms that the weights of a frozen base may be kept in; and to say that they shall be kept as numbers
Quantisation = Literal["int8", "nf4", "fp8"]
Quantise = Literal["int8", "nf4", "fp8", "none"]


class Strategy(StrEnum):
    """The three ways to adapt a base, and not adapting it at all."""

    PROMPTING = "prompting"
    FULL = "full"
    P_TUNING = "p-tuning"
    ADAPTERS = "adapters"


class Scope(StrEnum):
    """How far an adaptation reaches: `ROW`: rows of different adaptations share one batch; `BASE`: it is another base."""

    ROW = "row"
    BASE = "base"


class MethodConfig(Given):
    """Base of every method's own config."""


class Digests(Frozen):
    """What a base is, by content: sha256 (hex) of its weights, of its config and of its tokenizer."""

    weights: str
    config: str
    tokenizer: str


def digest(document: object) -> str:
    """sha256 (hex) of a document's canonical JSON: the same content gives the same name on every machine."""
    data = document.model_dump(mode="json") if isinstance(document, BaseModel) else document
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def defaults(kind: type[BaseModel]) -> dict[str, object]:
    """What a document of this kind means where it says nothing."""
    return kind.model_construct().model_dump(mode="json")


def differences(
    old: Mapping[str, object],
    new: Mapping[str, object],
    path: str = "",
    since: Mapping[str, object] = MappingProxyType({}),
) -> Iterator[Problem]:
    """Every value in which two documents differ, by its path.

    Args:
        since: what a key means that the older one may be too old to have.
    """
    for key in {**old, **new}:
        was, now, later = old.get(key, since.get(key)), new.get(key), since.get(key)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from differences(was, now, f"{path}{key}.", later if isinstance(later, Mapping) else {})
        elif was != now:
            yield Problem(f"{path}{key}", f"was {was!r}, is {now!r}")
