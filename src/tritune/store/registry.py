"""Adaptations on disk: save, find, read, list. A folder, named by content, is there whole or not at all.

    <root>/<first 12 hex digits of the content hash>/
        manifest.json             what it is and what it belongs to
        adaptation.safetensors    what was learned; or, for a whole base, a plain Hugging Face folder beside the manifest

Knows manifests and tensors; no model, no method.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritune.errors import Mismatch, Problem
from tritune.store.files import (
    check_tensors,
    check_writable,
    file_sha256,
    folder_bytes,
    publish,
    read_json,
    read_tensors,
    recover,
    saving,
    staging,
    write_json,
    write_tensors,
)
from tritune.store.manifest import FORMAT, Manifest

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
TENSORS = "adaptation.safetensors"
WHOLE_BASE = "model.safetensors"

MISSING = "missing"
#: keys by which a document is a manifest of ours, whatever else is wrong with it
OURS = frozenset({"method", "strategy", "template", "files"})

#: makes a manifest from the sha256 of every file
Describe = Callable[[Mapping[str, str]], Manifest]


@dataclass(frozen=True, slots=True)
class Stored:
    """An adaptation on disk."""

    folder: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        return self.manifest.id()

    @property
    def bytes(self) -> int:
        return folder_bytes(self.folder)

    @property
    def is_whole(self) -> bool:
        """Whether the folder holds exactly this."""
        try:
            return read(self.folder).manifest == self.manifest and not any(self.damage())
        except Mismatch:
            return False

    def tensors(self) -> dict[str, Tensor]:
        """What was learned.

        Raises:
            Mismatch: a file is missing, cut off, or not the one the manifest was written with.
        """
        tensors, problems = self.contents()
        Mismatch.check(f"{self.folder} is damaged or was changed.", problems, "Get a fresh copy.")
        return tensors

    def contents(self) -> tuple[dict[str, Tensor], list[Problem]]:
        """The tensors as far as they can be read, and everything that is wrong with the files."""
        problems = list(self.damage())
        name = TENSORS if TENSORS in self.manifest.files else WHOLE_BASE
        try:
            return read_tensors(self.folder / name), problems
        except Mismatch as error:
            known = {problem.where for problem in problems}
            return {}, [*problems, *(problem for problem in error.problems if problem.where not in known)]

    def visible_damage(self) -> Iterator[Problem]:
        """What is wrong with the files, as far as it shows without reading them through: missing or cut off."""
        for name in self.manifest.files:
            path = self.folder / name
            if not path.is_file():
                yield Problem(name, MISSING)
            elif path.suffix == ".safetensors":
                try:
                    check_tensors(path)
                except Mismatch as error:
                    yield from error.problems

    def damage(self) -> Iterator[Problem]:
        """Files that are missing, or not those that the manifest was written with. Reads all of them."""
        for name, wanted in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                yield Problem(name, MISSING)
                continue
            try:
                found = file_sha256(path)
            except OSError as error:
                yield Problem(name, f"cannot be read: {error.strerror}")
                continue
            if found != wanted:
                yield Problem(name, f"sha256 is {found[:12]}, the manifest says {wanted[:12]}")


def save(
    root: Path,
    describe: Describe,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    whole_base: Callable[[Path], None] | None = None,
) -> Stored:
    """Write an adaptation below `root`, under the name its content gives it. The same content twice is the same folder.

    Args:
        describe: makes the manifest from the digests of the files.
        tensors: what was learned; or
        whole_base: writes a Hugging Face folder into the given one.

    Raises:
        StorageError: it could not be written; nothing that was there is touched.
    """
    with staging(root) as made:
        manifest = _fill(made, describe, tensors, whole_base)
        stored = Stored(root / manifest.id()[:12], manifest)
        if not stored.is_whole:
            publish(made, stored.folder)
    return stored


def save_as(
    folder: Path,
    describe: Describe,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    whole_base: Callable[[Path], None] | None = None,
) -> Stored:
    """As `save`, to a folder of the user's naming, in place of an older adaptation there.

    Raises:
        Mismatch: something else is there.
    """
    check_place(folder)
    with staging(folder.absolute().parent) as made:
        manifest = _fill(made, describe, tensors, whole_base)
        publish(made, folder)
    return Stored(folder, manifest)


def check_place(folder: Path) -> None:
    """Whether `save_as` may write there.

    Raises:
        Mismatch: something else is there.
        StorageError: nothing may be written there.
    """
    Mismatch.check(
        f"{folder} exists and is not just an adaptation; nothing was written.",
        _in_the_way(folder),
        "Choose another place.",
    )
    check_writable(folder)


def _in_the_way(folder: Path) -> Iterator[Problem]:
    """What would be lost if the folder were replaced: everything but an adaptation's own files."""
    if folder.is_dir():
        try:
            own = {MANIFEST, *read(folder).manifest.files}
            inside = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
        except Mismatch:
            own, inside = set(), sorted(folder.iterdir())
        names = [path.relative_to(folder).as_posix() for path in inside]
        yield from (Problem(name, "is no part of an adaptation") for name in names if name not in own)
    elif folder.exists():
        yield Problem(str(folder), "is a file")


def _fill(
    folder: Path, describe: Describe, tensors: Mapping[str, Tensor] | None, whole_base: Callable[[Path], None] | None
) -> Manifest:
    if whole_base is not None:
        with saving(folder):
            whole_base(folder)
    else:
        write_tensors(folder / TENSORS, tensors or {})
    files = {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    manifest = describe(files)
    write_json(folder / MANIFEST, manifest.model_dump(mode="json") | {"id": manifest.id()})
    return manifest


def read(folder: Path) -> Stored:
    """The adaptation in a folder; its tensors are read later.

    Raises:
        Mismatch: no adaptation, or its manifest is damaged, of a newer format, or not the one it was named for.
    """
    if not folder.is_dir():
        raise Mismatch(f"There is no adaptation at {folder}.", hint="`tritune list` shows those that are there.")
    data = read_json(folder / MANIFEST)
    found = data.get("format") if isinstance(data, dict) else None
    if isinstance(found, int) and found > FORMAT:
        raise Mismatch(
            f"{folder} was written by a newer tritune.", [Problem("format", f"{found}, known up to {FORMAT}")]
        )
    wanted = data.pop("id", None) if isinstance(data, dict) else None  # folders of before have none
    manifest = Manifest.read(data, str(folder / MANIFEST))
    if wanted is not None and wanted != manifest.id():
        raise Mismatch(
            f"{folder} is damaged or was changed.",
            [Problem(MANIFEST, f"its content hash is {manifest.id()[:12]}, it was stored as {str(wanted)[:12]}")],
        )
    if re.fullmatch(r"[0-9a-f]{12}", folder.name) and folder.name != manifest.id()[:12]:
        raise Mismatch(
            f"{folder} is damaged or was changed.",
            [Problem(MANIFEST, f"its content hash is {manifest.id()[:12]}, the folder is named {folder.name}")],
        )
    return Stored(folder, manifest)


def find(ref: str, roots: tuple[Path, ...] = (Path("runs"), Path())) -> Stored:
    """An adaptation by folder, or by (the beginning of) its content hash below the roots.

    Raises:
        Mismatch: none, or several.
    """
    folder = Path(ref)
    if folder.is_dir() or folder.name in recover(folder.parent):
        return read(folder)
    named = survey(roots) if re.fullmatch(r"[0-9a-f]{4,64}", ref) else []
    hits = {found.stored.id: found.stored for found in named if found.stored and found.stored.id.startswith(ref)}
    if len(hits) == 1:
        return next(iter(hits.values()))
    for found in named:
        if not hits and found.stored is None and found.folder.name.startswith(ref[:12]):
            return read(found.folder)  # which cannot be done, and says why
    what = "several adaptations" if hits else "no adaptation"
    raise Mismatch(
        f"'{ref}' names {what}.",
        [Problem(str(stored.folder), stored.manifest.method) for stored in hits.values()],
        "Give the folder, or more of the content hash. `tritune list` shows what is there.",
    )


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that holds an adaptation, or what is left of one.

    stored: None where its manifest cannot be used.
    problems: what is wrong with it, as far as it shows without reading every byte.
    """

    folder: Path
    stored: Stored | None
    problems: tuple[Problem, ...]


def survey(roots: tuple[Path, ...]) -> list[Found]:
    """Every adaptation below the roots, damaged or not, sorted by folder. Half-written and foreign folders are left out."""
    found = []
    for folder in sorted({folder for root in roots for folder in _folders(root)}):
        try:
            stored = read(folder)
            found.append(Found(folder, stored, tuple(stored.visible_damage())))
        except Mismatch as error:
            if _is_ours(folder):
                found.append(Found(folder, None, error.problems))
    return found


def listing(roots: tuple[Path, ...]) -> list[Stored]:
    """Every adaptation below the roots whose manifest can be used, sorted by folder."""
    return [found.stored for found in survey(roots) if found.stored]


def _is_ours(folder: Path) -> bool:
    """Whether a folder whose manifest cannot be used is an adaptation's: by the files beside it, or by its keys."""
    if any((folder / name).is_file() for name in (TENSORS, WHOLE_BASE)):
        return True
    try:
        data = read_json(folder / MANIFEST)
    except Mismatch:
        return False
    return isinstance(data, dict) and data.keys() >= OURS


def _folders(root: Path) -> Iterator[Path]:
    """Folders with a manifest or tensors of ours below a root; hidden ones (half-written, .venv, .git) are not entered."""
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner + recover(Path(folder)) if name[0] != "." and name != "node_modules"]
        if MANIFEST in files or TENSORS in files:
            yield Path(folder)
