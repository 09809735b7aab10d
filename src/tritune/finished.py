"""What a comparison has measured so far, in memory and in its folder; a later start takes over what is there.

    plan.json                     everything that decides the figures: plan, data, base, machine
    examples/<method>-<seed>.jsonl, entries/<method>-<seed>.json     one measurement; the entry is written last
    adaptations/                  what was trained

Only a start with the same plan.json may go on there, so every entry is of this plan. Knows no method and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tritune.errors import Mismatch
from tritune.evaluate.record import Entry, ExampleResult
from tritune.progress import Progress
from tritune.report.told import told
from tritune.spec import differences
from tritune.store import registry
from tritune.store.files import read_json, write_json, write_text

PLAN, ENTRIES, EXAMPLES, ADAPTATIONS = "plan.json", "entries", "examples", "adaptations"

Results = tuple[ExampleResult, ...]


@dataclass
class Finished:
    """Measurements in the order in which they were added or taken over."""

    out: Path
    entries: list[Entry] = field(default_factory=list)
    results: dict[str, dict[int, Results]] = field(default_factory=dict)
    _before: dict[tuple[str, int], tuple[Entry, Results]] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, out: Path, plan: Mapping[str, object], progress: Progress, since: Mapping[str, object] | None = None
    ) -> Self:
        """Start in a folder, or go on where an earlier start was stopped.

        Args:
            plan: everything that decides the figures, as plain data.
            since: what settings mean that an earlier start may have been too early for.

        Raises:
            Mismatch: the folder has measurements of another plan; names every difference.
        """
        found = cls(out)
        plan = json.loads(json.dumps(plan))
        if any((out / ENTRIES).glob("*.json")):
            problems = differences(read_json(out / PLAN), plan, since=since or {})
            hint = "Go on with what it was begun with, choose another folder, or start anew with --overwrite."
            Mismatch.check(f"{out} holds another comparison; nothing was changed.", problems, hint)
            found._read(progress)
        write_json(out / PLAN, plan)
        return found

    def _read(self, progress: Progress) -> None:
        for path in sorted((self.out / ENTRIES).glob("*.json")):
            entry = Entry.read(read_json(path), str(path))
            results = self._results(entry)
            folder = self._adaptation(entry)
            if len(results) != entry.n or (folder and not _is_whole(folder)):
                progress.say(told("not_whole", progress.lang, name=path.stem))
                continue
            moved = {"adaptation": str(folder) if folder else None}
            self._before[entry.method, entry.seed] = entry.model_copy(update=moved), results
        names = "; ".join(told("seed", progress.lang, method=method, seed=seed) for method, seed in self._before)
        progress.say(told("going_on", progress.lang, out=self.out, names=names))

    def holds(self, method: str, seed: int) -> bool:
        """Whether an earlier start measured it, and nobody has taken it over yet."""
        return (method, seed) in self._before

    def take(self, method: str, seed: int) -> Entry | None:
        """What an earlier start measured; it counts as found from now on. None: it has to be measured."""
        if (method, seed) not in self._before:
            return None
        entry, results = self._before.pop((method, seed))
        self._keep(entry, results)
        return entry

    def add(self, entry: Entry, results: Sequence[ExampleResult]) -> None:
        """A new measurement, kept on disk."""
        self._keep(entry, tuple(results))
        lines = [json.dumps(r.model_dump(mode="json"), ensure_ascii=False) for r in results]
        write_text(self._path(EXAMPLES, entry, ".jsonl"), "\n".join(lines) + "\n")
        write_json(self._path(ENTRIES, entry, ".json"), entry.model_dump(mode="json"))

    def _keep(self, entry: Entry, results: Results) -> None:
        self.entries.append(entry)
        self.results.setdefault(entry.method, {})[entry.seed] = results

    def _path(self, kind: str, entry: Entry, suffix: str) -> Path:
        return self.out / kind / f"{entry.method}-{entry.seed}{suffix}"

    def _results(self, entry: Entry) -> Results:
        path = self._path(EXAMPLES, entry, ".jsonl")
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return tuple(ExampleResult.read(json.loads(line), str(path)) for line in lines)

    def _adaptation(self, entry: Entry) -> Path | None:
        """Where it is now: the whole folder may have been moved."""
        return self.out / ADAPTATIONS / Path(entry.adaptation).name if entry.adaptation else None


def _is_whole(folder: Path) -> bool:
    try:
        return registry.read(folder).is_whole
    except Mismatch:
        return False
