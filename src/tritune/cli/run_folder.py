"""The folder of one training run: what was run, what happened, the state to go on from, and the result.

    run.yaml        the settings, resolved, and what they came to (digests of base and data)
    events.jsonl    everything that happened, a line each
    state/<step>/   what is needed to go on; only the newest, gone when the run is finished
    adaptation/     the result
    metrics.json, dev_score.svg, train_loss.svg

Knows documents, tensors and files; no model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tritune.cli.loading import RUN
from tritune.errors import Mismatch, Problem
from tritune.recipes import documents
from tritune.store.files import (
    publish,
    read_json,
    read_tensors,
    recover,
    saving,
    staging,
    write_json,
    write_tensors,
    write_text,
)

if TYPE_CHECKING:
    from tritune.train.loop import Event
    from tritune.train.state import TrainState

EVENTS, STATE, ADAPTATION, METRICS = "events.jsonl", "state", "adaptation", "metrics.json"
DEV_CURVE, LOSS_CURVE = "dev_score.svg", "train_loss.svg"
#: everything a run writes
OWN = frozenset({RUN, EVENTS, STATE, ADAPTATION, METRICS, DEV_CURVE, LOSS_CURVE})

_TENSORS, _FACTS = "state.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder by its path; it need not be there yet."""

    path: Path

    @property
    def adaptation(self) -> Path:
        return self.path / ADAPTATION

    @property
    def finished(self) -> bool:
        return (self.path / METRICS).is_file()

    def begun(self) -> Path:
        """The settings of the run that was begun here, as a recipe.

        Raises:
            Mismatch: no run was begun here.
        """
        path = self.path / RUN
        if not path.is_file():
            raise Mismatch(f"There is no run to resume at {self.path}.", [Problem(RUN, "missing")])
        return path

    def begin(self, settings: Mapping[str, object], command: str) -> None:
        """Write down what is about to run."""
        write_text(self.path / RUN, documents.text(settings, comment=command))
        write_text(self.path / EVENTS, "")

    # --- the state

    def save(self, state: TrainState) -> None:
        """Keep a state; the one before it goes when the new one is whole on the disk.

        Raises:
            StorageError: it could not be written; the one before is untouched.
        """
        root = self.path / STATE
        target = root / f"{state.facts.step:09d}"
        with staging(root) as made:
            write_tensors(made / _TENSORS, state.tensors)
            write_json(made / _FACTS, state.facts.model_dump(mode="json"))
            publish(made, target)
        for old in set(root.iterdir()) - {target}:
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> TrainState | None:
        """The newest state, or None if none was saved.

        Raises:
            Mismatch: it is damaged.
        """
        from tritune.train.state import Facts, TrainState

        root = self.path / STATE
        recover(root)
        # A hidden folder is one that a killed process had not finished.
        saved = sorted(p for p in root.glob("*") if not p.name.startswith(".")) if root.is_dir() else []
        if not saved:
            return None
        facts = Facts.read(read_json(saved[-1] / _FACTS), str(saved[-1] / _FACTS))
        return TrainState(facts, read_tensors(saved[-1] / _TENSORS))

    def drop_state(self) -> None:
        """The run is finished: nothing is left to resume."""
        shutil.rmtree(self.path / STATE, ignore_errors=True)

    # --- what happens

    def forget_after(self, step: int) -> None:
        """Drop events that a killed process wrote after its last state: they will happen again."""
        path = self.path / EVENTS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        write_text(path, "".join(f"{line}\n" for line in lines if _step(line) <= step))

    def recorded(self, events: Iterator[Event]) -> Iterator[Event]:
        """The same events, each written down as it passes."""
        with saving(self.path / EVENTS), (self.path / EVENTS).open("a", encoding="utf-8") as file:
            for event in events:
                file.write(json.dumps(_line(event), allow_nan=False) + "\n")
                file.flush()
                yield event


def _line(event: Event) -> dict[str, object]:
    point = event.point.model_dump(mode="json", exclude_none=True)
    own = {"kind": event.kind, "total": event.total}
    if event.kind == "step":
        own |= {"learning_rate": event.learning_rate, "gradient_norm": event.gradient_norm}
    if event.kind == "evaluation":
        own["best"] = event.best
    return own | point | ({"reason": event.reason} if event.reason else {})


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # cut off by a kill
