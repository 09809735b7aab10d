"""Libraries that are to be read from disk again: found, and still what they were."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.libraries import environments, forget


def test_libraries_are_found_and_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libsome.so.3"
    library.write_bytes(b"machine code" * 1000)
    (tmp_path / "lib" / "some.py").write_text("x = 1", encoding="utf-8")
    (tmp_path / "lib" / "gone.so").symlink_to(tmp_path / "nowhere")
    assert forget([tmp_path]) == (1 if hasattr(os, "posix_fadvise") else 0)
    assert library.read_bytes() == b"machine code" * 1000


def test_the_own_environment_is_among_them() -> None:
    assert Path(sys.prefix) in environments()
