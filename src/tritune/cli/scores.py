"""What the records of its run tell of a stored adaptation: its score, the size of its base. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tritune.cli.comparison_folder import RECORD
from tritune.cli.run_folder import METRICS

if TYPE_CHECKING:
    from tritune.store.registry import Stored

ENTRIES = "entries"


def score_of(stored: Stored) -> Mapping[str, object] | None:
    """{"metric", "score", "low", "high", "n"} on the test rows of its run; None where no record tells."""
    run = stored.folder.absolute().parent
    metrics = _document(run / METRICS)
    test = metrics.get("test")
    if metrics.get("id") == stored.id and isinstance(test, dict):
        return {"metric": metrics["metric"], **test}
    for entry in _entries(run.parent):
        if Path(str(entry.get("adaptation"))).name == stored.folder.name:
            return {key: entry[key] for key in ("metric", "score", "low", "high", "n")}
    return None


def base_bytes_of(stored: Stored) -> int | None:
    """Memory that the base's weights took in its run; None where no record tells."""
    run = stored.folder.absolute().parent
    metrics = _document(run / METRICS)
    base = _document(run.parent / RECORD).get("base")
    known = metrics.get("base_bytes") if metrics.get("id") == stored.id else None
    if known is None and isinstance(base, dict):
        known = base.get("bytes")
    return known if isinstance(known, int) else None


def _entries(folder: Path) -> list[dict[str, object]]:
    """The entries of a comparison, or of one that is still running."""
    whole = _document(folder / RECORD).get("entries")
    if isinstance(whole, list):
        return whole
    return [_document(path) for path in sorted((folder / ENTRIES).glob("*.json"))]


def _document(path: Path) -> dict[str, object]:
    """A record, or nothing where there is none that can be read: what they tell is an extra here."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
