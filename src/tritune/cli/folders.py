"""The folder that a command writes: free, or replaced only when the new one is whole. Knows names, not contents."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from tritune.errors import Mismatch, Problem
from tritune.progress import Progress
from tritune.report.told import told
from tritune.store.files import check_writable, saving


def check_free(folder: Path, own: Collection[str], *, overwrite: bool, hint: str = "") -> None:
    """Whether a command that writes the names `own` may write here.

    Raises:
        Mismatch: an earlier run is here, or it may be replaced but other files are with it.
        StorageError: nothing may be written here.
    """
    if folder.exists() and not folder.is_dir():
        raise Mismatch(f"{folder} is a file; nothing was written.", hint="Choose another --out.")
    check_writable(folder)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not there & set(own):
        return
    if not overwrite:
        advice = f"{hint}Choose another --out, or replace it with --overwrite."
        raise Mismatch(f"{folder} holds an earlier run; nothing was changed.", hint=advice)
    foreign = sorted(name for name in there - set(own) if not name.startswith("."))
    Mismatch.check(
        f"{folder} cannot be replaced; nothing was changed.",
        [Problem(name, "is not from such a run") for name in foreign],
        "Move these files, or choose another --out.",
    )


@contextmanager
def replacing(folder: Path, own: Collection[str], progress: Progress) -> Iterator[None]:
    """Make the folder free to write into; an earlier run is moved aside, and deleted once the new one is whole.

    Where the new one fails before it has any result, the folder is as it was before.
    """
    aside = None
    with saving(folder):
        if folder.is_dir() and {path.name for path in folder.iterdir()} & set(own):
            aside = _unused(folder)
            folder.rename(aside)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        _keep(folder, own, aside, progress)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _keep(folder: Path, own: Collection[str], aside: Path | None, progress: Progress) -> None:
    """After a failure: what was finished stays, and so does the earlier run."""
    written = [folder / name for name in own if (folder / name).exists()]
    if any(path.is_dir() and any(path.iterdir()) for path in written):
        progress.say(told("kept", progress.lang, folder=folder))
        if aside is not None:
            progress.say(told("earlier", progress.lang, folder=aside))
        return
    for path in written:
        path.rmdir() if path.is_dir() else path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
        if aside is not None:
            aside.rename(folder)


def _unused(folder: Path) -> Path:
    number = 1
    while (found := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    return found
