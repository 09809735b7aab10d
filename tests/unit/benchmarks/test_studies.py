"""What one types to run a study, and the rows that come of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.studies import asked, write
from tritune.tasks.base import Split


def typed(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["study", *map(str, arguments)])


def test_a_study_gets_its_rows_and_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"tokens": ["Anna", "met", "Bert", "Low"], "tags": ["B-person", "O", "B-person", "I-person"]}
    for split in Split:
        (tmp_path / f"{split.value}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    typed(monkeypatch, "entities", "--rows", tmp_path)
    found = asked("cheaper", None)
    assert found is not None
    assert (found.out, found.command) == (
        Path("runs/cheaper-entities"),
        "python -m benchmarks.cheaper entities --rows FOLDER",
    )
    lines = write(tmp_path, found.rows)[Split.TRAIN].read_text(encoding="utf-8").splitlines()
    assert lines == ["text,label", "Anna met Bert Low => Anna,person", "Anna met Bert Low => Bert Low,person"]


def test_without_a_study_there_is_nothing_to_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch)
    assert asked("cheaper", None) is None
    typed(monkeypatch, "entities")
    with pytest.raises(SystemExit):
        asked("cheaper", None)
    assert "needs --rows FOLDER" in capsys.readouterr().err
