"""Folders that commands write: nothing of anybody's is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritune.cli.folders import check_free, replacing
from tritune.errors import Mismatch
from tritune.progress import Silent

OWN = {"run.yaml", "results"}


def earlier(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.yaml").write_text("old")
    return folder


def test_free_is_what_holds_nothing_of_ours(tmp_path: Path) -> None:
    check_free(tmp_path / "new", OWN, overwrite=False)
    (tmp_path / "letter.txt").write_text("mine")
    check_free(tmp_path, OWN, overwrite=False)
    with pytest.raises(Mismatch, match="is a file"):
        check_free(tmp_path / "letter.txt", OWN, overwrite=True)


def test_an_earlier_run_needs_a_word(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "run")
    with pytest.raises(Mismatch, match="Resume it"):
        check_free(folder, OWN, overwrite=False, hint="Resume it. ")
    check_free(folder, OWN, overwrite=True)
    (folder / "letter.txt").write_text("mine")
    with pytest.raises(Mismatch, match=r"letter\.txt"):
        check_free(folder, OWN, overwrite=True)


def test_the_old_goes_when_the_new_is_whole(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "run")
    with replacing(folder, OWN, Silent()):
        assert list(folder.iterdir()) == []
        assert (tmp_path / "run.before-1" / "run.yaml").read_text() == "old"
        (folder / "run.yaml").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder / "run.yaml").read_text() == "new"


def test_the_old_stays_when_the_new_fails(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "run")

    def fail(number: int) -> None:
        with replacing(folder, OWN, Silent()):
            (folder / "run.yaml").write_text(f"broken {number}")
            (folder / "results").mkdir()
            (folder / "results" / "first").write_text("of two")
            raise KeyboardInterrupt

    for number in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            fail(number)
    assert (tmp_path / "run.before-1" / "run.yaml").read_text() == "old"
    assert (tmp_path / "run.before-2" / "run.yaml").read_text() == "broken 1"


def test_a_run_without_results_leaves_no_trace(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        with replacing(folder, OWN, Silent()):
            (folder / "run.yaml").write_text("bad data")
            raise KeyboardInterrupt

    folder = earlier(tmp_path / "run")
    for place in (folder, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            fail(place)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (folder / "run.yaml").read_text() == "old"


def test_foreign_files_beside_a_new_run_stay(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with replacing(tmp_path, OWN, Silent()):
        (tmp_path / "run.yaml").write_text("new")
    assert (tmp_path / "letter.txt").read_text() == "mine"
