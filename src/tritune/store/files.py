"""Files that are there whole or not at all: written aside, synced, renamed. Read strictly. Never pickle.

Knows JSON, text, safetensors and folders; not what they mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritune.errors import Mismatch, Problem, StorageError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turn failures of the disk into one clear error.

    Raises:
        StorageError: no space, no permission, a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "The disk is full; free some space and run the same command again.",
            errno.EACCES: "You may not write there; choose another place with --out.",
            errno.EROFS: "That file system is read-only; choose another place with --out.",
        }.get(error.errno or 0, "Choose another place with --out.")
        raise StorageError(
            f"Could not write {target}: {error.strerror or error}. {hint} Nothing saved before was touched."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) in one step."""
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)


def write_json(path: Path, data: object) -> None:
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        Mismatch: it is missing or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Mismatch(f"{path.parent} is not complete.", [Problem(path.name, "missing")]) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Mismatch(f"{path.parent} is damaged.", [Problem(path.name, f"is no JSON: {error}")]) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; views of one storage become tensors of their own."""
    from safetensors.torch import save_file

    with saving(path):
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path, {"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        Mismatch: missing, cut off, or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise Mismatch(f"{path.parent} is not complete.", [Problem(path.name, "missing")])
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise Mismatch(
            f"{path.parent} is damaged.", [Problem(path.name, f"is no whole safetensors file: {error}")]
        ) from None


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A hidden folder to fill below `parent`; `publish` gives it its name. What was not published is gone afterwards."""
    with saving(parent):
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def publish(made: Path, target: Path) -> None:
    """Let a filled folder take the place of `target`; an older one is deleted last."""
    with saving(target):
        made.chmod(0o755)
        old = made.with_name(f"{made.name}-old")
        if target.exists():
            target.rename(old)
        made.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
