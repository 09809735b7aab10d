"""The table of mutations fits the code and the guards as they are now; `make guards` is what tries them, in minutes."""

from __future__ import annotations

import ast

import pytest

from tests.guards.broken import GUARDS, ROOT, copied, unguarded
from tests.guards.mutations import MUTATIONS, Mutation


def guards() -> set[str]:
    """file::test of every guard."""
    return {
        f"{path.name}::{node.name}"
        for path in (ROOT / GUARDS).glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.defect)
def test_a_mutation_changes_one_place_and_names_guards(mutation: Mutation) -> None:
    text = (ROOT / "src" / "tritune" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1
    assert mutation.old != mutation.new
    ast.parse(text.replace(mutation.old, mutation.new))
    assert mutation.red
    assert {test.partition("[")[0] for test in mutation.red} <= guards()


def test_every_guard_has_a_mutation() -> None:
    assert unguarded(sorted(guards()), MUTATIONS) == []


def test_a_mutation_that_no_longer_fits_stops_everything() -> None:
    stale = Mutation("x", "errors.py", "text that is not there", "", ("test_public_defects.py::test_x",))
    with pytest.raises(SystemExit, match="found 0 times"), copied(stale):
        pass
