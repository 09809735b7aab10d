"""Our own note beside the files of another format: what the format itself cannot say (which base exactly, which task).

Other packages pass it over. Reading it back, an import knows the base by content and needs no task options.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from tritune.adaptation import Adaptation, base_ref
from tritune.errors import Mismatch, Problem
from tritune.run import BaseRef
from tritune.spec import Frozen
from tritune.store.files import file_sha256, read_json, write_json

SIDECAR = "tritune.json"


class Sidecar(Frozen):
    """`files`: sha256 of every other file of the folder. `config` and `task`: documents of the method and the task."""

    version: int = Field(default=1, ge=1, le=1)
    format: str
    method: str
    config: Mapping[str, object]
    base: BaseRef
    task: Mapping[str, object]
    files: Mapping[str, str]


def write_sidecar(adaptation: Adaptation, format: str, folder: Path) -> None:
    """Write the note for a folder that is otherwise complete."""
    note = Sidecar(
        format=format,
        method=adaptation.method.kind,
        config=adaptation.config.model_dump(mode="json"),
        base=base_ref(adaptation.base),
        task=adaptation.task.spec.model_dump(mode="json"),
        files=files_of(folder),
    )
    write_json(folder / SIDECAR, note.model_dump(mode="json"))


def read_sidecar(folder: Path) -> Sidecar | None:
    """The note of a folder, if there is one.

    Raises:
        Mismatch: it is damaged, or the files beside it are not those it was written for.
    """
    if not (folder / SIDECAR).is_file():
        return None
    note = Sidecar.read(read_json(folder / SIDECAR), str(folder / SIDECAR))
    found = files_of(folder)
    Mismatch.check(
        f"{folder / SIDECAR} was written for other files than those beside it.",
        [
            Problem(name, "missing" if name not in found else "was changed")
            for name, wanted in note.files.items()
            if found.get(name) != wanted
        ],
        f"Get a fresh copy; or, if another program trained on from here, delete {SIDECAR} and say the task again.",
    )
    return note


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, our note left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths if path.name != SIDECAR}
