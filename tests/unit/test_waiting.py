"""Stand-ins turn to what they stand for: nobody who uses one can tell, but by what has not been imported yet."""

from __future__ import annotations

import builtins
import copy
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tritune.waiting import waiting

HEAVY = """
import heavy_friend
class Thing:
    size = 3
    def __init__(self, n=0): self.n = n
    def __class_getitem__(cls, key): return (cls, key)
class Part(Thing): pass
def double(n): return 2 * n
def friend(): return heavy_friend.NAME
"""
USER = """
from typing import Optional
from heavy import Thing, double
from heavy.inner import DEEP
import heavy
import package.heavy_part
def given(x: Thing | None, y: Optional[Thing] = None) -> "int | Thing": return x
def is_thing(x): return isinstance(x, (str, Thing))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, text in {
        "heavy/__init__.py": HEAVY,
        "heavy/inner.py": "DEEP = {'a': 1}",
        "heavy_friend.py": "from other_heavy import *\nfrom other_heavy import Base\nclass Own(Base): pass\nNAME = 'friend'",
        "other_heavy.py": "class Base: pass",
        "package/__init__.py": "",
        "package/heavy_part.py": "def mark(f=None, *, twice=False): f.marked = twice; return f",
        "user.py": USER,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


MODULES = ("heavy", "other_heavy", "package.heavy_part")


def loaded() -> list[str]:
    return [name for name in (*MODULES, "heavy_friend", "heavy.inner") if name in sys.modules]


def user(**meanwhile: Any) -> Any:
    import_module("package")
    with waiting(MODULES, importers=["user"], meanwhile=meanwhile):
        return import_module("user")


@pytest.mark.usefixtures("folder")
def test_nothing_is_imported_before_it_is_used_and_all_of_it_then() -> None:
    module = user()
    assert not module.is_thing(3)
    assert module.is_thing("text")
    assert loaded() == []
    assert module.double(4) == 8
    assert loaded() == ["heavy", "other_heavy", "heavy_friend"]  # what is brought imports its own at once
    import heavy  # type: ignore[import-not-found]

    assert module.is_thing(heavy.Thing())
    assert not module.is_thing(3)
    assert issubclass(heavy.Part, module.Thing)
    assert module.Thing(5).n == 5
    assert module.Thing.size == 3
    assert module.Thing[int] == (heavy.Thing, int)
    assert module.heavy.friend() == "friend"
    assert module.heavy.Thing.__name__ == "Thing"
    assert module.DEEP["a"] == 1
    assert list(module.DEEP.items()) == [("a", 1)]
    module.Thing.size = 4
    assert heavy.Thing.size == 4


@pytest.mark.usefixtures("folder")
def test_a_class_of_a_stand_in_is_a_class_of_the_real_one() -> None:
    module = user()
    namespace: dict[str, Any] = {"Thing": module.Thing}
    exec("class Own(Thing):\n    def __init__(self): Thing.__init__(self, 7)", namespace)
    import heavy

    assert namespace["Own"].__mro__[1] is heavy.Thing
    assert namespace["Own"]().n == 7


@pytest.mark.usefixtures("folder")
def test_imports_are_as_ever_afterwards() -> None:
    before = builtins.__import__
    user()
    import package

    assert builtins.__import__ is before
    assert not hasattr(package, "heavy_part")  # no stand-in is left where an import looks
    import package.heavy_part

    assert package.heavy_part.mark(lambda: 0).marked is False


@pytest.mark.usefixtures("folder")
def test_what_is_there_or_not_installed_does_not_wait() -> None:
    import heavy

    with waiting(("heavy", "no_such_module"), importers=[__name__.partition(".")[0]]):
        from heavy import Thing

        assert Thing is heavy.Thing
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            import no_such_module  # type: ignore[import-not-found]  # noqa: F401


@pytest.mark.usefixtures("folder")
def test_a_function_does_something_else_only_until_its_module_is_there() -> None:
    module = user(**{"heavy.double": lambda n: -n})
    assert module.double(4) == -4
    assert loaded() == []
    import_module("heavy")
    assert module.double(4) == 8


def test_a_mark_waits_for_who_reads_it(folder: Path) -> None:
    (folder / "marked.py").write_text(
        "import package\n@package.heavy_part.mark\ndef plain(n): return n + 1\n"
        "@package.heavy_part.mark(None, twice=True)\ndef twice(n): return n + 2\n"
    )
    import_module("package")
    with waiting(MODULES, importers=["marked"], marks=["package.heavy_part.mark"]):
        module = import_module("marked")
    assert (module.plain(1), module.twice(1)) == (2, 3)
    assert loaded() == []
    import_module("package.heavy_part")
    assert (module.plain(1), module.twice(1)) == (2, 3)
    assert (module.plain.__wrapped__.marked, module.twice.__wrapped__.marked) == (False, True)


def test_no_other_function_is_taken_for_a_mark(folder: Path) -> None:
    (folder / "asking.py").write_text("import package\nfound = package.heavy_part.mark(lambda: 0)\n")
    import_module("package")
    with waiting(MODULES, importers=["asking"]):
        assert import_module("asking").found.marked is False
    assert loaded() == ["package.heavy_part"]


@pytest.mark.usefixtures("folder")
def test_only_the_named_packages_wait_and_only_in_this_thread() -> None:
    with waiting(MODULES, importers=["user"]):
        import_module("heavy_friend")
        assert loaded() == ["other_heavy", "heavy_friend"]
        with ThreadPoolExecutor() as pool:
            assert pool.submit(import_module, "user").result().double(2) == 4
        assert "heavy" in loaded()


@pytest.mark.usefixtures("folder")
def test_one_at_a_time_and_what_was_before_comes_back() -> None:
    before = builtins.__import__
    with waiting(MODULES, importers=["user"]):
        first = builtins.__import__
        with waiting(MODULES, importers=["user"]):
            assert builtins.__import__ is first
        assert builtins.__import__ is first
        module = import_module("user")
    assert builtins.__import__ is before
    with waiting(MODULES, importers=["heavy_friend"]):  # brought in here, yet at once
        assert module.heavy.friend() == "friend"
    assert type(sys.modules["other_heavy"]) is type(sys)


def test_after_an_error_nobody_is_left_with_a_stand_in(folder: Path) -> None:
    """So that a second attempt, without waiting, is an import as ever."""
    (folder / "user.py").write_text(f"{USER}\nif type(Thing) is not type: raise TypeError('a class was expected')\n")
    (folder / "done.py").write_text("from heavy import Thing\nimport user\n")
    (folder / "first.py").write_text("from heavy import Thing, double\nimport heavy\n")
    import_module("package")
    before = builtins.__import__
    with pytest.raises(TypeError), waiting(MODULES, importers=["user", "done", "first"]):
        import_module("first")
        import_module("done")
    import heavy

    assert builtins.__import__ is before
    assert sys.modules["first"].Thing is heavy.Thing
    assert sys.modules["first"].heavy is heavy


@pytest.mark.usefixtures("folder")
def test_values_are_counted_with_compared_and_gone_through(folder: Path) -> None:
    (folder / "heavy_values.py").write_text("SIZE, NONE, NAMES = 8, 0, ['a', 'b']")
    (folder / "user.py").write_text("from heavy_values import SIZE, NONE, NAMES")
    with waiting(["heavy_values"], importers=["user"]):
        module = import_module("user")
    assert (17 // module.SIZE, module.SIZE * 2, 2 - module.SIZE, module.SIZE > 3) == (2, 16, -6, True)
    assert not module.NONE
    assert list(module.NAMES) == ["a", "b"]
    assert "a" in module.NAMES
    assert copy.deepcopy(module.NAMES) == ["a", "b"]
