"""YAML <-> plain data, with the scalars of YAML 1.2 and nothing that could surprise. Knows no keys.

PyYAML speaks YAML 1.1, where `no` is false, `12:30` is 750, `1e-3` is a text and a repeated key silently wins. Labels and
learning rates are exactly such values, so: numbers and true/false as in JSON, everything else is text, repeats are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tritune.errors import Mismatch, Problem

#: tag -> (pattern, first characters); as in JSON, with YAML's own spellings of null
_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|false|True|False", "tfTF"),
    "tag:yaml.org,2002:null": (r"~|null|Null|", "~nN\0"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (pattern, first) in _SCALARS.items():
        for character in first:
            key = "" if character == "\0" else character
            table.setdefault(key, []).append((tag, re.compile(f"(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    """Plain data only; a repeated key is an error."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key has to be a plain word", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} appears twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(str(self.construct_scalar(node)))  # 1.1 would read 0755 as octal

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(str(self.construct_scalar(node)))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers = _resolvers()


def _number(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # Line ends of every kind and invisible characters survive only as escapes.
    plain = value.isprintable() or not value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(float, _number)
_Dumper.add_representer(str, _text)


def value(text: str) -> object:
    """What a word on the command line stands for: `4`, `1e-3`, `true`, `null`, `[attn.q, attn.v]`, or just text."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError:
        return text


def parse(text: str, where: str) -> dict[str, object]:
    """A document of settings.

    Raises:
        Mismatch: it is no YAML, or something else than keys with values.
    """
    try:
        data = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise Mismatch("These settings cannot be read.", [Problem(f"{where}{line}", f"is no YAML: {what}")]) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        what = "expected keys with values, such as 'epochs: 2'"
        raise Mismatch("These settings cannot be read.", [Problem(where, what)])
    return {str(key): content for key, content in data.items()}


def text(document: Mapping[str, object], comment: str = "") -> str:
    """The document as YAML, keys in their order, below a comment."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
