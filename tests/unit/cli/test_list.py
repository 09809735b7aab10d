"""`tritune list` and `show`: every adaptation on a line of its own, no folder's name broken, damage told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.unit.store.adaptations import TENSOR, manifest, other
from tritune.cli.app import app
from tritune.cli.list import tell
from tritune.store.registry import MANIFEST, TENSORS, Stored, save

LONG = "a folder with a long name, " * 6


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    return save(tmp_path / LONG, manifest, tensors=TENSOR)


@pytest.mark.parametrize("columns", ["40", "80", "1000"])
def test_off_a_terminal_an_adaptation_is_one_line(stored: Stored, tmp_path: Path, columns: str) -> None:
    told = CliRunner(env={"COLUMNS": columns}).invoke(app, ["list", str(tmp_path)]).stdout.splitlines()
    line = next(line for line in told if stored.id[:12] in line)
    assert line.split()[:3] == [stored.id[:12], "lora", "tiny"]
    assert line.rstrip().endswith(str(stored.folder))
    assert len(told) == 3, "a head, a rule and the adaptation"


@pytest.mark.parametrize(("columns", "lines"), [(40, 2), (80, 2), (300, 3)])
def test_a_narrow_terminal_gets_the_folder_on_a_line_of_its_own(columns: int, lines: int) -> None:
    file = io.StringIO()
    tell(Console(file=file, force_terminal=True, width=columns), [("0123456789ab", "lora", "tiny", "–", "1 kB", LONG)])
    told = file.getvalue().splitlines()
    assert len(told) == lines
    assert LONG in told[-1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), f"{TENSORS}: missing"),
    "tensors cut off": (lambda folder: cut(folder / TENSORS), f"{TENSORS}: is no whole safetensors file"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"{MANIFEST}: missing"),
    "manifest cut off": (lambda folder: cut(folder / MANIFEST), f"{MANIFEST}: is no JSON"),
    "a folder for a manifest": (
        lambda folder: ((folder / MANIFEST).unlink(), (folder / MANIFEST).mkdir())[0],
        f"{MANIFEST}: cannot be read",
    ),
    "another's manifest": (lambda folder: (folder / MANIFEST).write_text("{}") and None, "'method'"),
}


@pytest.fixture(params=DAMAGE)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Stored, str]:
    """One of two adaptations, and what is wrong with it."""
    save(tmp_path, other(seed=1), tensors=TENSOR)
    stored = save(tmp_path, manifest, tensors=TENSOR)
    damage, said = DAMAGE[request.param]
    damage(stored.folder)
    return stored, said


def test_a_damaged_adaptation_is_marked_beside_the_others(damaged: tuple[Stored, str], tmp_path: Path) -> None:
    stored, said = damaged
    told = CliRunner().invoke(app, ["list", str(tmp_path)])
    lines = [line for line in told.stdout.splitlines() if str(tmp_path) in line]
    assert told.exit_code == 0
    assert len(lines) == 2
    assert ["DAMAGED" in line for line in lines] == [str(stored.folder) in line for line in lines]
    assert str(stored.folder) in told.stderr
    assert said in told.stderr
    listed = json.loads(CliRunner().invoke(app, ["list", str(tmp_path), "--json"]).stdout)
    assert listed[0].keys() == listed[1].keys(), "a script finds the same keys"
    wrong = {each["folder"]: each["problems"] for each in listed}
    assert said in "".join(wrong.pop(str(stored.folder)))
    assert list(wrong.values()) == [[]]


def test_a_damaged_adaptation_is_shown_with_what_is_wrong(
    damaged: tuple[Stored, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, said = damaged
    name = said.partition(":")[0].strip("'")
    monkeypatch.chdir(tmp_path)
    for ref in (str(stored.folder), stored.folder.name[:6]):
        told = CliRunner().invoke(app, ["show", ref])
        assert told.exit_code == 2
        assert name in told.stderr, told.stderr


def test_the_run_folder_of_a_damaged_adaptation_says_the_same(tmp_path: Path) -> None:
    stored = save(tmp_path / "run", manifest, tensors=TENSOR)
    cut(stored.folder / MANIFEST)
    told = CliRunner().invoke(app, ["show", str(tmp_path / "run")])
    assert (told.exit_code, told.stdout) == (2, "")
    assert "is no JSON" in told.stderr
    (tmp_path / "empty").mkdir()
    nothing = CliRunner().invoke(app, ["show", str(tmp_path / "empty")])
    assert nothing.exit_code == 2
    assert "no adaptation in" in nothing.stderr
