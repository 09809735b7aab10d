"""Imports that wait until something they bring is used, for libraries that import more than is needed here.

transformers imports torch's compiler, SymPy, SciPy, accelerate and the machinery of clusters to have their names at hand:
more than half of the time it takes itself, and a hundred megabytes of every process, for what tritune hardly ever calls.
Inside `waiting`, `from a import b` gives a stand-in that turns to the real b at its first use: nothing behaves otherwise,
only later. Python 3.15 has such imports of its own (PEP 810). Knows modules by name, not what is in them.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec, resolve_name
from typing import Any, Union


@contextmanager
def waiting(
    modules: Sequence[str], *, marks: Collection[str] = (), meanwhile: Mapping[str, Callable[..., Any]] | None = None
) -> Iterator[None]:
    """Inside, whoever imports these modules, or modules within them, gets stand-ins, unless they are there already or not
    installed. What is brought in the end imports its own at once.

    Args:
        marks: decorators by their full names that mark a function for their own module: a mark waits as long as that does.
        meanwhile: full name of a function -> what is called for it as long as its module is not there.
    """
    imports = _Imports(builtins.__import__, tuple(modules), frozenset(marks), meanwhile or {})
    builtins.__import__ = imports
    try:
        with imports.attributes():
            yield
    finally:
        builtins.__import__ = imports.at_once


class _Imports:
    """What an import statement calls."""

    def __init__(
        self,
        at_once: Callable[..., Any],
        modules: tuple[str, ...],
        marks: frozenset[str],
        meanwhile: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.at_once, self.modules, self.marks, self.meanwhile = at_once, modules, marks, meanwhile
        self._bringing = False

    def __call__(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        full = resolve_name("." * level + name, (globals or {}).get("__package__") or "") if level else name
        if not self._waits(full):
            return self.at_once(name, globals, locals, fromlist, level)
        package = full.partition(".")[0]
        if full == package or (fromlist and "*" not in fromlist):
            return _Module(full, self)
        if full in self.modules and package in sys.modules and not fromlist:
            return sys.modules[package]  # `import a.b` is followed by `a.b`, which `attributes` has put there
        with self._at_once():
            return self.at_once(name, globals, locals, fromlist, level)

    def _waits(self, name: str) -> bool:
        if self._bringing or not any(name == module or name.startswith(f"{module}.") for module in self.modules):
            return False
        return name not in sys.modules and find_spec(name.partition(".")[0]) is not None

    def bring(self, name: str) -> Any:
        with self._at_once():
            return import_module(name)

    @contextmanager
    def _at_once(self) -> Iterator[None]:
        self._bringing, before = True, self._bringing
        try:
            yield
        finally:
            self._bringing = before

    @contextmanager
    def attributes(self) -> Iterator[None]:
        """Inside, the modules that wait are attributes of their packages, as if they had been imported."""
        placed = []
        for module in self.modules:
            parent, _, name = module.rpartition(".")
            if parent in sys.modules and name not in vars(sys.modules[parent]) and self._waits(module):
                stand_in = _Module(module, self)
                setattr(sys.modules[parent], name, stand_in)
                placed.append((sys.modules[parent], name, stand_in))
        try:
            yield
        finally:
            for package, name, stand_in in placed:
                if vars(package).get(name) is stand_in:  # not brought meanwhile
                    delattr(package, name)


class _Module:
    """A module that waits."""

    def __init__(self, name: str, imports: _Imports) -> None:
        self._name, self._imports = name, imports

    def __getattr__(self, name: str) -> Any:
        if self._name in sys.modules or name.startswith("__"):
            return getattr(self._imports.bring(self._name), name)
        return _Name(_Wanted(self._name, name, self._imports))


@dataclass(frozen=True)
class _Wanted:
    """What a module that waits has under a name."""

    module: str
    name: str
    imports: _Imports

    def there(self) -> bool:
        return self.module in sys.modules

    def __call__(self) -> Any:
        bring = self.imports.bring
        module = bring(self.module)
        return getattr(module, self.name) if hasattr(module, self.name) else bring(f"{self.module}.{self.name}")

    def to_call(self) -> Callable[..., Any]:
        full = f"{self.module}.{self.name}"
        if not self.there() and full in self.imports.marks:
            return partial(_marked, self)
        if not self.there() and full in self.imports.meanwhile:
            return self.imports.meanwhile[full]
        called: Callable[..., Any] = self()
        return called


class _Name:
    """Its stand-in. Whatever is asked of it, it asks of what it stands for, but for what can be said without."""

    def __init__(self, wanted: _Wanted) -> None:
        object.__setattr__(self, "wanted", wanted)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _wanted(self).to_call()(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        wanted = _wanted(self)
        if name.startswith("__") and not wanted.there():
            return object.__getattribute__(self, name)  # what annotations and wrappers ask of anything
        return getattr(wanted(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_wanted(self)(), name, value)

    def __instancecheck__(self, instance: Any) -> bool:
        """Nothing can be of a class that nobody has imported."""
        return _wanted(self).there() and isinstance(instance, _wanted(self)())

    def __subclasscheck__(self, subclass: type) -> bool:
        return _wanted(self).there() and issubclass(subclass, _wanted(self)())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_wanted(self)(),)

    def __getitem__(self, key: Any) -> Any:
        return _wanted(self)()[key]

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007  # the operator asks what a class is

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


def _wanted(stand_in: _Name) -> _Wanted:
    found: _Wanted = object.__getattribute__(stand_in, "wanted")
    return found


def _marked(mark: _Wanted, function: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A function that bears the mark as soon as somebody is there to see it; without one, what gives it the mark."""
    if function is None:
        return partial(_marked, mark, *args, **kwargs)
    real: list[Any] = []

    @wraps(function)
    def marked(*given: Any, **named: Any) -> Any:
        if not mark.there():
            return function(*given, **named)
        if not real:
            real.append(mark()(function, *args, **kwargs))
        return real[0](*given, **named)

    return marked
