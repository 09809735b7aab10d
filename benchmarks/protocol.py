"""What a measuring process is told and what it answers, as JSON. Standard library only: every environment imports it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

#: what a process says when it is loaded, and after every turn but the last
READY = "ready"


@dataclass(frozen=True, slots=True)
class Row:
    """A row as ids; `target` follows `context` and is what is learned."""

    context: list[int]
    target: list[int]

    @property
    def tokens(self) -> int:
        """Real tokens that go through a model: the last of the target is only predicted."""
        return len(self.context) + len(self.target) - 1


@dataclass(frozen=True, slots=True)
class Setup:
    """How a library is used.

    Attributes:
        library: "tritune", "peft" (full fine-tuning: plain transformers), "adapters" or "lm-eval".
        loop: "own" (tritune's; for a peer a bare loop), "trainer" or "trl".
        dtype: "float32", "bfloat16", "autocast" (a peer's: fp32 weights, products in bf16) or "default".
        attention: transformers' name of an attention, or "default".
        batch: what one step takes: tokens for tritune, rows for a peer.
        sort: rows of similar length together.
        rows: without `sort`, so many rows of each turn are enough.
        compiled: tritune with `--compile`.
        tuned: leave out what a person in a hurry for speed would leave out (see `benchmarks/README.md`).
    """

    library: str
    loop: str
    dtype: str
    attention: str
    batch: int
    sort: bool
    tuned: bool
    rows: int = 16
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class Spec:
    """What one process does, turn by turn.

    Attributes:
        method: tritune's name of the method.
        config: fields of its config; peers read rank, alpha, tokens, reduction_factor from it.
        folder: the base, as transformers loads it.
        rows: file written by `write_rows`.
        turns: for each turn, its optimizer steps, each a list of row indexes. The first turn warms up and is not timed.
        again: tritune keeps what texts are to the base from pass to pass, and its first turn is a whole pass.
        choices: ids of the possible answers: nothing is trained, a step scores all of them for each of its rows.
    """

    setup: Setup
    method: str
    config: dict[str, float | str]
    folder: str
    rows: str
    turns: list[list[list[int]]]
    learning_rate: float
    device: str = "cpu"
    again: bool = False
    choices: list[list[int]] = field(default_factory=list)

    @property
    def batches(self) -> list[list[int]]:
        """All steps, one after the other."""
        return [members for turn in self.turns for members in turn]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Spec:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**fields, "setup": Setup(**fields["setup"])})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a process measured.

    Attributes:
        seconds: wall time of the steps, by turn.
        losses: of every step, in order: mean loss per supervised token; of a scoring step, minus the mean log-likelihood
            of all answers, by which one sees that both sides computed the same.
        peak_bytes: resident memory of the process while training, libraries and base included.
        matrix_rates: for each turn, operations per second of a large square product by format: before and after it.
        flops: necessary operations of every step (see `flops.py`); only tritune's side counts them.
    """

    seconds: list[list[float]]
    losses: list[float]
    peak_bytes: int
    matrix_rates: list[dict[str, list[float]]]
    dtype: str
    threads: int
    versions: dict[str, str]
    flops: list[int]

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Outcome:
        return cls(**json.loads(text))


def write_rows(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    return [Row(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
