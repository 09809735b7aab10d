"""A folder of another package in: read strictly, given a task, checked against that package, an adaptation of ours.

Knows formats and adaptations; no format by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

from tritune.adaptation import Adaptation, Origin
from tritune.errors import Mismatch, Problem
from tritune.exchange import recognise
from tritune.exchange.format import Absent, Format
from tritune.exchange.sidecar import Sidecar, files_of, read_sidecar
from tritune.exchange.verify import Verdict, sample_rows
from tritune.exchange.verify import verify as verified
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.spec import digest
from tritune.store.manifest import ref_misfits
from tritune.tasks.base import Task
from tritune.tasks.stored import task_from_document


@dataclass(frozen=True, slots=True)
class Imported:
    """An adaptation from elsewhere. `notes`: what was rewritten; `verdict`: None where the other package is not installed."""

    adaptation: Adaptation
    format: str
    notes: tuple[str, ...]
    verdict: Verdict | None


def import_folder(
    folder: str | Path,
    base: Base,
    task: Task | None = None,
    *,
    same_base: bool = False,
    verify: bool = True,
    python: str | None = None,
) -> Imported:
    """An adaptation from a folder of another package.

    Args:
        folder: as PEFT or adapter-hub wrote it.
        base: the base it was trained on. A folder that tritune exported knows it by content, others by names and shapes.
        task: what its answers mean; None: the task that tritune wrote beside the files.
        same_base: the base is the right one, though the folder calls it by another name.
        verify: let the other package answer a sample, where it is installed, and compare.
        python: an interpreter that has it, where this one has not.

    Raises:
        Mismatch: unknown keys, missing, surplus or misshapen tensors, another base, no task: one error with everything;
            or the two sides answer differently.
    """
    place = Path(folder)
    found, note = check(place, task)
    problems = _other_base(found, place, note, base, same_base=same_base)
    try:
        incoming = found.read(place, base)
    except Mismatch as error:
        raise Mismatch(error.title, [*problems, *error.problems], error.hint) from None
    Mismatch.check(f"{place} belongs to another base.", problems)
    known = task if task is not None or note is None else task_from_document(note.task)
    assert known is not None
    origin = Origin(Training(), 0.0, 0, 0, {f"imported from {found.name}": digest(files_of(place))})
    adaptation = Adaptation(base, known, incoming.config, incoming.tensors, origin)
    verdict = _verdict(found, place, adaptation, python) if verify else None
    if verdict is not None and not verdict.holds:
        raise Mismatch(f"{place} answers differently here than where it comes from: {verdict}.")
    return Imported(adaptation, found.name, (*incoming.notes, *_form_notes(note, base)), verdict)


def check(folder: Path, task: Task | None) -> tuple[Format, Sidecar | None]:
    """The format of a folder and our note in it, if nothing that shows without a base speaks against an import.

    Raises:
        Mismatch: no known format, files that are not those of the note, or no task.
    """
    found, note = recognise(folder), read_sidecar(folder)
    if task is None and note is None:
        raise Mismatch(
            f"{folder} does not say what its answers mean.",
            hint="Give the task: --labels, and --label-words, --template, --text-field where they are not the defaults.",
        )
    return found, note


def _form_notes(note: Sidecar | None, base: Base) -> tuple[str, ...]:
    """Only a folder of ours tells on which form of the base it was trained."""
    if note is None or note.base.quantised == base.quantised:
        return ()
    there, here = (form or "unquantised" for form in (note.base.quantised, base.quantised))
    return (f"trained on {there} weights of the base, and now on {here} ones: its answers may differ slightly",)


def _verdict(found: Format, folder: Path, adaptation: Adaptation, python: str | None) -> Verdict | None:
    rows = sample_rows(adaptation.base, adaptation.method.virtual_tokens(adaptation.config))
    try:
        return verified(found, folder, adaptation, rows, python)
    except Absent:
        if python is not None:
            raise
        return None


def _other_base(found: Format, folder: Path, note: Sidecar | None, base: Base, *, same_base: bool) -> list[Problem]:
    """By content where tritune wrote the folder, else by the last part of the name."""
    if note is not None:
        return ref_misfits(note.base, base.name, base.digests)
    named = found.base_name(folder)
    if named is None or same_base or PurePath(named).name.lower() == PurePath(base.name).name.lower():
        return []
    what = f"{named!r} there, {base.name!r} here; if it is the same base under two names, say so with --same-base"
    return [Problem("name of the base", what)]
