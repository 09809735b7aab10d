"""Imports that wait until something they bring is used, for libraries that import more than is needed here.

transformers imports torch's compiler, SymPy, SciPy, accelerate and the machinery of clusters to have their names at hand:
more than half of the time it takes itself, and a hundred megabytes of every process, for what tritune hardly ever calls.
Inside `waiting`, `from a import b` gives such an importer a stand-in that turns to the real b at its first use. Python 3.15
has imports of this kind itself (PEP 810). Knows modules by name, not what is in them; decision 0021 says where it ends.
"""

from __future__ import annotations

import builtins
import operator
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from importlib.util import find_spec, resolve_name
from types import FunctionType
from typing import Any, Union


@contextmanager
def waiting(
    modules: Sequence[str],
    *,
    importers: Collection[str],
    marks: Collection[str] = (),
    meanwhile: Mapping[str, Callable[..., Any]] | None = None,
) -> Iterator[None]:
    """Inside, packages that import these modules, or modules within them, get stand-ins, unless the modules are there already
    or not installed. For this thread only, and inside one such context at a time: a second one does nothing. When it ends
    with an error, whoever got a stand-in is given what it stands for.

    Args:
        importers: the packages, by their top-level names.
        marks: decorators by their full names that mark a function for their own module: a mark waits as long as that does.
        meanwhile: full name of a function -> what is called for it as long as its module is not there.
    """
    if isinstance(builtins.__import__, _Imports):
        yield
        return
    imports = _Imports(builtins.__import__, tuple(modules), frozenset(importers), frozenset(marks), meanwhile or {})
    try:
        imports.place()
        builtins.__import__ = imports  # type: ignore[assignment]  # as typeshed has it
        yield
    except BaseException:
        imports.end()
        imports.give_back()
        raise
    else:
        imports.end()


class _Bringing(threading.local):
    """Whether this thread imports what somebody has been waiting for: all of that is imported at once."""

    now = False


_bringing = _Bringing()


def _bring(module: str) -> Any:
    _bringing.now, before = True, _bringing.now
    try:
        return import_module(module)
    finally:
        _bringing.now = before


class _Imports:
    """What an import statement calls."""

    def __init__(
        self,
        at_once: Callable[..., Any],
        modules: tuple[str, ...],
        importers: frozenset[str],
        marks: frozenset[str],
        meanwhile: Mapping[str, Callable[..., Any]],
    ) -> None:
        self.at_once, self.modules, self.importers = at_once, modules, importers
        self.marks, self.meanwhile = marks, meanwhile
        self._thread = threading.get_ident()
        self._importing: list[dict[str, Any]] = []  # where stand-ins may lie
        self._placed: list[tuple[Any, str, _Module]] = []

    def __call__(
        self,
        name: str,
        globals: dict[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        importer = globals or {}
        package = str(importer.get("__name__")).partition(".")[0]
        if package in self.importers and threading.get_ident() == self._thread and not _bringing.now:
            full = resolve_name("." * level + name, importer.get("__package__") or "") if level else name
            found = self._stand_in(full, fromlist or ())
            if found is not None:
                self._importing.append(importer)
                return found
        return self.at_once(name, globals, locals, fromlist, level)

    def _stand_in(self, name: str, fromlist: Sequence[str]) -> Any:
        """What an import of this name gives; None: it does not wait."""
        if not self._waits(name) or "*" in fromlist:
            return None
        package, _, rest = name.partition(".")
        if fromlist or not rest:
            return _Module(name, self)
        placed = any(module._name == name for _, _, module in self._placed)
        return sys.modules[package] if placed else None  # `import a.b` is followed by `a.b`

    def _waits(self, name: str) -> bool:
        within = any(name == module or name.startswith(f"{module}.") for module in self.modules)
        return within and name not in sys.modules and find_spec(name.partition(".")[0]) is not None

    def place(self) -> None:
        """Modules that wait become attributes of their packages, as if they had been imported."""
        for module in self.modules:
            parent, _, name = module.rpartition(".")
            if parent in sys.modules and name not in vars(sys.modules[parent]) and self._waits(module):
                stand_in = _Module(module, self)
                setattr(sys.modules[parent], name, stand_in)
                self._placed.append((sys.modules[parent], name, stand_in))

    def end(self) -> None:
        now: Any = builtins.__import__
        if now is self:  # nobody else has taken the place meanwhile
            builtins.__import__ = self.at_once
        for package, name, stand_in in self._placed:
            if vars(package).get(name) is stand_in:  # not brought meanwhile
                delattr(package, name)

    def give_back(self) -> None:
        for namespace in self._importing:
            for name, value in list(namespace.items()):
                if type(value) in (_Module, _Name):
                    namespace[name] = value._real() if type(value) is _Module else _real(value)


class _Module:
    """A module that waits."""

    def __init__(self, name: str, imports: _Imports) -> None:
        vars(self).update(_name=name, _imports=imports)

    def _real(self) -> Any:
        return _bring(self._name)

    def __getattr__(self, name: str) -> Any:
        if self._name in sys.modules or name.startswith("__"):
            return getattr(self._real(), name)
        return _Name(self._name, name, self._imports)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real(), name, value)


#: of the stand-in itself: how it becomes a base class, and how it is copied
ITS_OWN = ("__mro_entries__", "__reduce__", "__reduce_ex__")
#: what annotations and class bodies ask of anything: nobody needs the real thing for it
ASKED_OF_ANYTHING = ("__class__", "__dict__", "__isabstractmethod__", "__parameters__", "__typing_subst__")


class _Name:
    """What a module that waits would have under a name. Whatever is asked of it, it asks of what it stands for, but for what
    can be said without."""

    def __init__(self, module: str, name: str, imports: _Imports) -> None:
        object.__setattr__(self, "of", (module, name, imports))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module, name, imports = _of(self)
        if module not in sys.modules and f"{module}.{name}" in imports.marks and _marks(args):
            return _marked(self, *args, **kwargs)
        if module not in sys.modules and f"{module}.{name}" in imports.meanwhile:
            return imports.meanwhile[f"{module}.{name}"](*args, **kwargs)
        return _real(self)(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name in ITS_OWN or (name in ASKED_OF_ANYTHING and not _there(self)):
            return object.__getattribute__(self, name)
        return getattr(_real(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_real(self), name, value)

    def __instancecheck__(self, instance: Any) -> bool:
        """Nothing can be of a class that nobody has imported."""
        return _there(self) and isinstance(instance, _real(self))

    def __subclasscheck__(self, subclass: type) -> bool:
        return _there(self) and issubclass(subclass, _real(self))

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_real(self),)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007  # the operator asks what a class is

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007

    def __reduce__(self) -> Any:
        return _named, _of(self)[:2]


#: what Python looks for in a class, not in the object
_FORWARDED = {
    "bool": bool,
    "len": len,
    "iter": iter,
    **{name: getattr(operator, name) for name in ("contains", "getitem", "setitem", "lt", "le", "gt", "ge")},
}
_TWO_SIDED = ("add", "sub", "mul", "floordiv", "truediv", "mod")


def _forwarded(does: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *given: does(_real(self), *given)


def _from_the_right(does: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, left: does(left, _real(self))


for _name, _does in (_FORWARDED | {name: getattr(operator, name) for name in _TWO_SIDED}).items():
    setattr(_Name, f"__{_name}__", _forwarded(_does))
for _name in _TWO_SIDED:
    setattr(_Name, f"__r{_name}__", _from_the_right(getattr(operator, _name)))


def _of(stand_in: _Name) -> tuple[str, str, _Imports]:
    found: tuple[str, str, _Imports] = object.__getattribute__(stand_in, "of")
    return found


def _there(stand_in: _Name) -> bool:
    return _of(stand_in)[0] in sys.modules


def _real(stand_in: _Name) -> Any:
    return _named(*_of(stand_in)[:2])


def _named(module: str, name: str) -> Any:
    holder = _bring(module)
    return getattr(holder, name) if hasattr(holder, name) else _bring(f"{module}.{name}")


def _marks(args: tuple[Any, ...]) -> bool:
    """Whether it is called with a function, or to give something that will be."""
    return not args or args[0] is None or type(args[0]) is FunctionType


def _marked(mark: _Name, function: FunctionType | None = None, *args: Any, **kwargs: Any) -> Any:
    """A function that bears the mark as soon as somebody is there to see it; without one, what gives it the mark."""
    if function is None:
        return lambda later: _marked(mark, later, *args, **kwargs)
    plain: Callable[..., Any] = function
    real: list[Any] = []

    @wraps(plain)
    def marked(*given: Any, **named: Any) -> Any:
        if not _there(mark):
            return plain(*given, **named)
        if not real:
            real.append(_real(mark)(plain, *args, **kwargs))
        return real[0](*given, **named)

    return marked
