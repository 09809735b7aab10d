"""What was typed -> settings: the options that were given, as a document over a recipe.

Knows how lists, pairs and templates are written on a command line; what is allowed in them is settings' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import typer

from tritune import recipes
from tritune.recipes import documents
from tritune.recipes.settings import Settings, layered

S = TypeVar("S", bound=Settings)


def settings(
    kind: type[S], params: Mapping[str, object], recipe: str | None = None, more: Mapping[str, object] | None = None
) -> S:
    """The settings of a command.

    Args:
        params: the command's options; those named like a setting, and given, count.
        recipe: path or name of a recipe below them.
        more: further settings, as given on the command line.

    Raises:
        Mismatch: with everything that does not fit.
    """
    absent: tuple[object, ...] = (None, [], ())  # arguments that nobody gave are an empty list of them
    named = {name: value for name, value in params.items() if name in kind.model_fields and value not in absent}
    typed = {name: _READERS[name](str(value)) if name in _READERS else value for name, value in named.items()}
    below = recipes.read(recipe) if recipe is not None else {}
    return layered(kind, {**typed, **(more or {})}, below, recipe or "", option)


def option(setting: str) -> str:
    """What a setting is called on the command line, by its path ("rates.0" is a part of --rates)."""
    name = setting.partition(".")[0]
    return _OPTIONS.get(name) or f"--{name.replace('_', '-')}"


def assignments(given: Sequence[str]) -> dict[str, object]:
    """["rank=4", "roles=[attn.q]"] -> a document."""
    found: dict[str, object] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"'{text}' is not KEY=VALUE", param_hint="--set")
        found[key.strip()] = documents.value(value)
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _methods(text: str) -> object:
    names = _words(text)
    if not names:
        raise typer.BadParameter("names no method", param_hint="--methods")
    return "all" if names == ("all",) else names


def _values(text: str) -> tuple[object, ...]:
    return tuple(documents.value(part) for part in _words(text))


def _pairs(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in _words(text)]
    broken = [key for key, equals, _ in pairs if not equals]
    if broken:
        raise typer.BadParameter(f"'{broken[0]}' is not LABEL=WORDS", param_hint="--label-words")
    return {key.strip(): words.strip() for key, _, words in pairs}


def _template(text: str) -> str:
    if not text.startswith("@"):
        return text.replace("\\n", "\n")  # few shells let a person type a line end
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{text[1:]} cannot be read: {error}", param_hint="--template") from None


#: settings whose option has another name
_OPTIONS: Mapping[str, str] = {"configs": "--set", "config": "--set", "compiled": "--compile"}

_READERS: Mapping[str, Callable[[str], object]] = {
    "methods": _methods,
    "seeds": _values,
    "rates": _values,
    "labels": _words,
    "label_words": _pairs,
    "template": _template,
}
