"""An adaptation out into another package's form: written aside, answered by that package, and only then published.

Knows formats and verdicts; no format by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch, Problem
from tritune.exchange import format_named
from tritune.exchange.format import Absent, Format
from tritune.exchange.sidecar import write_sidecar
from tritune.exchange.verify import Verdict, sample_rows, verify, verify_by_ourselves
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig
from tritune.store.files import check_writable, publish, staging


@dataclass(frozen=True, slots=True)
class Exported:
    """A published folder and how it was checked. `notes`: what of the base is in it, where that could be asked."""

    folder: Path
    format: str
    verdict: Verdict
    notes: tuple[str, ...] = ()


def check(config: MethodConfig, format: str, folder: Path, python: str | None = None) -> Format:
    """The format, if nothing that shows without a base speaks against an export.

    Args:
        config: of the adaptation's method; the others as for `export`.

    Raises:
        Mismatch, NotMergeable, StorageError: as `export`.
        Absent: that interpreter is not there.
    """
    chosen = format_named(format)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise Mismatch(f"{folder} is there already; nothing was written.", hint="Choose another --out.")
    check_writable(folder)
    chosen.check(config)
    if python is not None and shutil.which(python) is None:
        raise Absent(f"{python} cannot be started: there is no such program.")
    return chosen


def export(
    adaptation: Adaptation,
    format: str,
    folder: str | Path,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    python: str | None = None,
) -> Exported:
    """Write an adaptation in another package's format.

    Args:
        format: a name of the table `FORMATS`.
        folder: where; must not be there yet, or be empty.
        rows: token ids of the rows that both sides answer; None: a built-in sample.
        python: an interpreter that has the reference library, where this one has not.

    Raises:
        Mismatch: the adaptation has no exact form there, the place is taken, or what was written does not answer as the
            adaptation does; no folder is left behind.
        NotMergeable: the format holds whole bases and this method cannot become one.
        StorageError: it could not be written.
    """
    target = Path(folder)
    chosen = check(adaptation.config, format, target, python)
    if rows is None:
        rows = sample_rows(adaptation.base, adaptation.method.virtual_tokens(adaptation.config))
    with staging(target.absolute().parent) as made:
        chosen.write(adaptation, made)
        verdict = _verdict(chosen, adaptation, made, rows, python)
        if not verdict.holds:
            problem = Problem(f"format '{format}'", str(verdict))
            raise Mismatch("What was written does not answer as the adaptation does; it was thrown away.", [problem])
        write_sidecar(adaptation, format, made)
        publish(made, target)
    return Exported(target, format, verdict, _notes(chosen, adaptation.base))


def _notes(chosen: Format, base: Base) -> tuple[str, ...]:
    if base.quantised is None:
        return ()
    if chosen.whole:
        return (
            f"the weights are those of the {base.quantised} base it was trained on, dequantised, not the original ones",
        )
    return (
        f"trained on {base.quantised} weights; compared on the original ones, where it may answer slightly differently",
    )


def _verdict(
    chosen: Format, adaptation: Adaptation, folder: Path, rows: Sequence[Sequence[int]], python: str | None
) -> Verdict:
    """By the reference library; where that is not installed, by our own importer."""
    try:
        return verify(chosen, folder, adaptation, rows, python)
    except Absent as absent:
        if python is not None:
            raise
        if not chosen.readable:
            raise Mismatch(
                f"What is written as '{chosen.name}' can only be checked by {chosen.reference}, and {absent}; "
                "nothing was written.",
                hint=f"Install {chosen.reference}, or name a Python that has it (--reference PYTHON).",
            ) from None
        return verify_by_ourselves(chosen, folder, adaptation, rows, str(absent))
