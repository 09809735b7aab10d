"""The folder of a comparison: what is written there, and whether one is to begin, to go on, or was finished here.

    run.yaml                                          the settings, resolved
    plan.json, entries/, examples/, adaptations/      what `tritune.finished` keeps
    comparison.md, report.html, comparison.json       the outcome; the last one is written last

Knows documents and files; measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tritune.cli import folders
from tritune.cli.loading import RUN
from tritune.errors import Mismatch
from tritune.finished import ADAPTATIONS, ENTRIES, EXAMPLES, PLAN
from tritune.recipes import documents
from tritune.recipes.settings import CompareSettings
from tritune.spec import defaults, differences
from tritune.store.files import read_json

if TYPE_CHECKING:
    from tritune.evaluate.record import Comparison

RECORD, TABLE, REPORT = "comparison.json", "comparison.md", "report.html"
#: everything a comparison writes
OWN = frozenset({RUN, RECORD, TABLE, REPORT, PLAN, ADAPTATIONS, ENTRIES, EXAMPLES})


def is_finished(out: Path) -> bool:
    return all((out / name).is_file() for name in (RUN, PLAN, RECORD))


def may_go_on(out: Path, *, overwrite: bool, hint: str = "") -> bool:
    """Whether a comparison was stopped here, and is to go on; else a new one may be written.

    Raises:
        Mismatch: neither: a finished run, or something else, is here.
    """
    if not overwrite and (out / PLAN).is_file() and not (out / RECORD).exists():
        return True
    folders.check_free(out, OWN, overwrite=overwrite, hint=hint)
    return False


def check_same(out: Path, settings: Mapping[str, object], data: Mapping[str, str]) -> None:
    """Whether the finished comparison here is the one that is asked for.

    Args:
        settings: resolved, as run.yaml has them. A number format that they leave to the machine is not looked at.
        data: digest of the rows of each split.

    Raises:
        Mismatch: names every difference.
    """
    was = documents.parse((out / RUN).read_text(encoding="utf-8"), str(out / RUN))
    now = documents.parse(documents.text(settings), "settings")
    if "dtype" not in now:
        was.pop("dtype", None)
    problems = list(differences(was, now, since=defaults(CompareSettings)))
    problems += differences(read_json(out / PLAN)["data"], data, "data.")
    hint = "Choose another --out, or replace it with --overwrite."
    Mismatch.check(f"{out} holds another comparison, which is finished; nothing was changed.", problems, hint)


def read(out: Path) -> Comparison:
    """
    Raises:
        Mismatch: there is no finished comparison, or its record is damaged.
    """
    from tritune.evaluate.record import Comparison

    return Comparison.read(read_json(out / RECORD), str(out / RECORD))
