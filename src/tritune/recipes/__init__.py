"""Recipes: settings of a command as YAML, by path or by the name of one that comes with the package.

A recipe holds only what differs from the defaults. Its keys are the long options' names with underscores. Knows files
and names; what the keys mean is `tritune.recipes.settings`' business.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from tritune.errors import Mismatch, Problem
from tritune.recipes.documents import parse


def packaged() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    found = (entry.name for entry in files("tritune.recipes").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


def read(ref: str) -> dict[str, object]:
    """The settings in a recipe, by path or packaged name.

    Raises:
        Mismatch: there is none, or it is no YAML document of settings.
    """
    if ref in packaged():
        return parse(files("tritune.recipes").joinpath(f"{ref}.yaml").read_text(encoding="utf-8"), f"recipe {ref}")
    path = Path(ref).expanduser()
    try:
        return parse(path.read_text(encoding="utf-8"), ref)
    except FileNotFoundError:
        near = difflib.get_close_matches(ref, packaged(), n=1)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        hint = f"Give a YAML file, or the name of a packaged recipe: {', '.join(packaged())}.{guess}"
        raise Mismatch("There is no such recipe.", [Problem(ref, "no such file")], hint) from None
    except UnicodeDecodeError as error:
        raise Mismatch("This recipe cannot be read.", [Problem(ref, f"is not UTF-8: {error.reason}")]) from None
    except OSError as error:
        raise Mismatch("This recipe cannot be read.", [Problem(ref, error.strerror or str(error))]) from None
