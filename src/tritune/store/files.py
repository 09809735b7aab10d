"""Files that are there whole or not at all: written aside, synced, renamed. Read strictly. Never pickle.

Knows JSON, text, safetensors and folders; not what they mean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritune.errors import Mismatch, Problem, StorageError
from tritune.store.exchange import exchange

if TYPE_CHECKING:
    from torch import Tensor

#: how a folder is called that is being filled, and one whose place is being taken (behind that place's name)
_NEW, _OLD = ".new-", ".old-"


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Turn failures of the disk into one clear error.

    Raises:
        StorageError: no space, no permission, a file where a folder should be.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:  # its writer wraps what the system said
        code = re.search(r"os error (\d+)", str(error))
        raise _storage_error(
            target, int(code[1]) if code else 0, os.strerror(int(code[1])) if code else error
        ) from error
    except OSError as error:
        raise _storage_error(target, error.errno or 0, error.strerror or error) from error


def _storage_error(target: Path, code: int, what: object) -> StorageError:
    hint = {
        errno.ENOSPC: "The disk is full; free some space and run the same command again.",
        errno.EACCES: "You may not write there; choose another place with --out.",
        errno.EROFS: "That file system is read-only; choose another place with --out.",
    }.get(code, "Choose another place with --out.")
    return StorageError(f"Could not write {target}: {what}. {hint} Nothing saved before was touched.")


def check_writable(target: Path) -> None:
    """Whether something may be made at `target`, as far as it shows without making it.

    Raises:
        StorageError: a file stands where a folder has to be, or nothing may be written there.
    """
    place = next(place for place in (target.absolute(), *target.absolute().parents) if place.exists())
    if not place.is_dir():
        raise _storage_error(target, errno.ENOTDIR, f"{place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise _storage_error(target, errno.EACCES, os.strerror(errno.EACCES))


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
        Mismatch: it is missing, cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Mismatch(f"{path.parent} is not complete.", [Problem(path.name, "missing")]) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Mismatch(f"{path.parent} is damaged.", [Problem(path.name, f"is no JSON: {error}")]) from None
    except OSError as error:
        problem = Problem(path.name, f"cannot be read: {error.strerror}")
        raise Mismatch(f"{path.parent} cannot be used.", [problem]) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; views of one storage become tensors of their own."""
    from safetensors.torch import save_file

    with saving(path):
        save_file(_apart(tensors), path, {"format": "pt"})
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them; a copy only of what shares memory with another one, for there may be gigabytes."""
    found: dict[str, Tensor] = {}
    taken: dict[int, list[tuple[int, int]]] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        start, end = own.data_ptr(), own.data_ptr() + own.nbytes
        beside = taken.setdefault(own.untyped_storage().data_ptr(), [])
        if any(start < other_end and other_start < end for other_start, other_end in beside):
            own = own.clone()
        else:
            beside.append((start, end))
        found[name] = own
    return found


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
        raise Mismatch(f"{path.parent} is damaged.", [_no_whole_file(path, error)]) from None


def check_tensors(path: Path) -> None:
    """Whether a safetensors file is as long as its head says. The tensors are not read.

    Raises:
        Mismatch: it is cut off, or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise Mismatch(f"{path.parent} is damaged.", [_no_whole_file(path, error)]) from None


def _no_whole_file(path: Path, error: Exception) -> Problem:
    return Problem(path.name, f"is no whole safetensors file: {error}")


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A hidden folder to fill below `parent`; `publish` gives it its name. What was not published is gone afterwards."""
    with saving(parent):
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=parent, prefix=_NEW))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def publish(made: Path, target: Path) -> None:
    """Let a filled folder take the place of `target`; an older one is deleted last. Others may do the same meanwhile.

    Where the system can exchange folders, one of the two is whole under that name at every moment. Elsewhere there are
    two renames; of a process that was killed between them, `recover` puts the older folder back.
    """
    replaced: list[Path] = []
    with saving(target):
        made.chmod(0o755)
        try:
            while not _placed(made, target):
                suffix = f"{made.name.removeprefix(_NEW)}{len(replaced)}"
                aside = target.with_name(f".{target.name}{_OLD}{suffix}")
                with suppress(FileNotFoundError):  # another process moved it first
                    target.rename(aside)
                    replaced.append(aside)
        except OSError:
            if replaced and not target.exists():
                replaced.pop().rename(target)
            raise
        _sync(target.parent)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)


def recover(parent: Path) -> list[str]:
    """Put back what a process had moved aside when it was killed; the names of what is there again.

    Another process that is just replacing such a folder replaces it once more.
    """
    found = []
    for aside in sorted(parent.glob(f".*{_OLD}*")):
        target = parent / aside.name[1:].rpartition(_OLD)[0]
        with suppress(OSError):  # another process was quicker, or nothing may be written here
            if not target.exists():
                aside.rename(target)
                found.append(target.name)
    return found


def _placed(made: Path, target: Path) -> bool:
    """False: something is there, and cannot be exchanged. Exchanged, it lies in `made`, which `staging` deletes."""
    if _renamed(made, target):
        return True
    with suppress(FileNotFoundError):  # another process moved it meanwhile
        return exchange(made, target)
    return False


def _renamed(made: Path, target: Path) -> bool:
    """False: something is there already."""
    try:
        made.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


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
