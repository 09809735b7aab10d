"""Adaptations on disk: save, find, read, list. A folder, named by content, is there whole or not at all.

    <root>/<first 12 hex digits of the content hash>/
        manifest.json             what it is and what it belongs to
        adaptation.safetensors    what was learned; or, for a whole base, a plain Hugging Face folder beside the manifest

Knows manifests and tensors; no model, no method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritune.errors import Mismatch, Problem
from tritune.store.files import (
    file_sha256,
    folder_bytes,
    publish,
    read_json,
    read_tensors,
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

    def tensors(self) -> dict[str, Tensor]:
        """What was learned.

        Raises:
            Mismatch: a file is missing, cut off, or not the one the manifest was written with.
        """
        Mismatch.check(f"{self.folder} is damaged or was changed.", self._changed_files(), "Get a fresh copy.")
        name = TENSORS if TENSORS in self.manifest.files else WHOLE_BASE
        return read_tensors(self.folder / name)

    def _changed_files(self) -> Iterator[Problem]:
        for name, wanted in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file():
                yield Problem(name, "missing")
            elif (found := file_sha256(path)) != wanted:
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
        target = root / manifest.id()[:12]
        if not target.exists():
            publish(made, target)
    return Stored(target, manifest)


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
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise Mismatch(f"{folder} exists and is no adaptation; nothing was written.", hint="Choose another place.")
    with staging(folder.absolute().parent) as made:
        manifest = _fill(made, describe, tensors, whole_base)
        publish(made, folder)
    return Stored(folder, manifest)


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
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
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
    manifest = Manifest.read(data, str(folder / MANIFEST))
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
    if Path(ref).is_dir():
        return read(Path(ref))
    hits = {
        stored.id: stored
        for stored in listing(roots)
        if re.fullmatch(r"[0-9a-f]{4,64}", ref) and stored.id.startswith(ref)
    }
    if len(hits) == 1:
        return next(iter(hits.values()))
    what = "several adaptations" if hits else "no adaptation"
    raise Mismatch(
        f"'{ref}' names {what}.",
        [Problem(str(stored.folder), stored.manifest.method) for stored in hits.values()],
        "Give the folder, or more of the content hash. `tritune list` shows what is there.",
    )


def listing(roots: tuple[Path, ...]) -> list[Stored]:
    """Every readable adaptation below the roots, sorted by folder. Half-written and foreign folders are passed over."""
    folders = {
        p.parent
        for root in roots
        if root.is_dir()
        for p in root.glob(f"**/{MANIFEST}")
        if not _hidden(p.relative_to(root))
    }
    found = []
    for folder in sorted(folders):
        try:
            found.append(read(folder))
        except Mismatch:
            continue
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
