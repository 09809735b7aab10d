"""What becomes of errors: ours are a message and an exit code, bugs keep their traceback."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from tritune import errors
from tritune.cli.app import app
from tritune.errors import Mismatch, Problem, TrituneError
from tritune.store import registry

OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TrituneError)]


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    def survey(*_: object) -> None:
        raise error

    monkeypatch.setattr(registry, "survey", survey)
    return CliRunner().invoke(app, ["list", "."])


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_our_errors_are_messages(kind: type[TrituneError], monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(monkeypatch, kind("It failed [/red] here."))
    assert (done.exit_code, done.stdout) == (kind.exit_code, "")
    assert done.stderr == "It failed [/red] here.\n"


def test_all_problems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(monkeypatch, Mismatch("Wrong.", [Problem("a", "x" * 200), Problem("b", "y")], "Repair it."))
    assert done.stderr.splitlines() == ["Wrong.", "  - a: " + "x" * 200, "  - b: y", "Repair it."]


def test_an_interruption_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(monkeypatch, KeyboardInterrupt())
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Stopped.\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    done = failing(monkeypatch, ZeroDivisionError("bug"))
    assert isinstance(done.exception, ZeroDivisionError)
