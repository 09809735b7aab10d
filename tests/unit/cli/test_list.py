"""`tritune list`: every adaptation on a line of its own, and no folder's name broken."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tests.unit.store.adaptations import TENSOR, manifest
from tritune.cli.app import app
from tritune.cli.list import tell
from tritune.store.registry import Stored, save

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
