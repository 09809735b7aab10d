"""`tritune list`: every stored adaptation below some folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tritune.cli import options
from tritune.cli.scores import score_of
from tritune.cli.screen import complain, echo_json, page
from tritune.errors import Mismatch, Problem
from tritune.report import units
from tritune.store import registry

if TYPE_CHECKING:
    from tritune.store.registry import Found, Stored

Roots = Annotated[list[Path] | None, typer.Argument(help="Where to look; else runs, else here.", metavar="ROOT...")]
SHOWN_ID = 12
#: columns that no line needs
ENDLESS = 1_000_000
DAMAGED = "DAMAGED"
#: what a list tells of an adaptation
KEYS = ("id", "method", "strategy", "base", "labels", "seed", "score", "stored_bytes", "folder")


def list_stored(roots: Roots = None, as_json: options.AsJson = False) -> None:
    """Show the adaptations that are stored: what they are, on which base, how good, where.

    Example:
      tritune list runs
    """
    places = tuple(roots or [Path("runs") if Path("runs").is_dir() else Path()])
    absent = [Problem(str(place), "no such folder") for place in places if not place.is_dir()]
    Mismatch.check("There is nothing to list.", absent)
    found = registry.survey(places)
    if as_json:
        echo_json([_document(each) for each in found])
    elif found:
        tell(page(), [_cells(each) for each in found])
        _complain(found)
    else:
        complain(f"No adaptations below {', '.join(map(str, places))}. `tritune demo` makes some.")


def document(stored: Stored) -> dict[str, object]:
    """What a list tells of a whole adaptation, by `KEYS`."""
    manifest = stored.manifest
    return {
        "id": stored.id,
        "method": manifest.method,
        "strategy": manifest.strategy.value,
        "base": manifest.base.name,
        "labels": manifest.task.get("labels"),
        "seed": manifest.seed,
        "score": score_of(stored),
        "stored_bytes": stored.bytes,
        "folder": str(stored.folder),
    }


def _document(found: Found) -> dict[str, object]:
    known = document(found.stored) if found.stored else dict.fromkeys(KEYS) | {"folder": str(found.folder)}
    return known | {"problems": [str(problem) for problem in found.problems]}


def _complain(found: Sequence[Found]) -> None:
    broken = [(each.folder, problem) for each in found for problem in each.problems]
    lines = [f"  - {folder}, {problem}" for folder, problem in broken]
    if lines:
        complain("\n".join(["These are damaged. Get fresh copies, or delete the folders.", *lines]))


def _cells(found: Found) -> tuple[str, ...]:
    stored = found.stored
    if stored is None:
        return "–", DAMAGED, "–", "–", "–", str(found.folder)
    manifest, known = stored.manifest, score_of(stored)
    score = f"{known['metric']} {known['score']:.3f}" if known else "–"
    score = DAMAGED if found.problems else score
    size = units.size(stored.bytes, "en")
    return stored.id[:SHOWN_ID], manifest.method, manifest.base.name, score, size, str(stored.folder)


def tell(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """A line each, however long; on a terminal too narrow for that, the folder on a line of its own. No path is broken."""
    table, endless = _table(rows), page(ENDLESS)
    if not console.is_terminal:
        endless.print(table)
    elif endless.measure(table).maximum <= console.width:
        console.print(table)
    else:
        for *facts, folder in rows:
            console.print("  ".join(facts), style="bold", soft_wrap=True)
            console.print(f"  {folder}", soft_wrap=True)


def _table(rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in ("id", "method", "base", "score", "stored", "folder"):
        table.add_column(name, justify="right" if name in ("score", "stored") else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*(Text(cell) for cell in cells))
    return table
