"""Who is measured against whom, and with which settings. The tables of the benchmarks; knows no torch.

`peers/best.json` holds what `python -m benchmarks.sweep` found fastest for each method on one machine, `peers/best-long.json`
what it found with `--data long`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.protocol import Setup
from tritune.methods import METHODS
from tritune.run import Training

HERE = Path(__file__).parent
BEST = {"short": HERE / "peers" / "best.json", "long": HERE / "peers" / "best-long.json"}
#: rows of a batch that the search tries
SIZES = {"short": (4, 8, 16, 32, 64), "long": (2, 4, 8, 16)}


@dataclass(frozen=True, slots=True)
class Subject:
    """One line of the table: a method of tritune's as it is measured, both sides with the same sizes.

    `again`: timed from the second pass over the rows on, with what the first one left behind (tritune's side).
    `formats`: those that the search tries for the peer. `against`: another line, whose best peer this one is held against
    too, because no peer has anything like it. `step`: tokens of tritune's own; what the package takes unless told otherwise,
    and 1,024 where the use of the machine is to be told for such steps."""

    kind: str
    config: Mapping[str, float | str]
    again: bool = False
    formats: tuple[str, ...] = ("float32", "bfloat16")
    against: str | None = None
    step: int = Training().batch_tokens


#: Sizes that the peers have too. The prompt starts as PEFT's does, so that losses can be compared.
_SUBJECTS = {
    "lora": Subject("lora", {"rank": 8, "alpha": 16.0}, step=1024),
    # Weights that are trained in bf16 themselves hardly move, since most steps are smaller than what it can tell apart:
    # that is fast, and no fine-tuning. A peer that trains them all keeps them in fp32.
    "full": Subject("full", {}, formats=("float32", "autocast"), step=1024),
    "ptuning": Subject("ptuning", {"tokens": 20, "start": "random"}),
    "ptuning-suffix-cached": Subject("ptuning", {"tokens": 20, "start": "random", "placement": "suffix"}, again=True),
    # what passes through the layers is one token a row, so steps of 1,024 are small ones
    "prefix-suffix-cached": Subject(
        "prefix", {"tokens": 20, "placement": "suffix"}, again=True, against="ptuning", step=1024
    ),
    "bottleneck": Subject("bottleneck", {"reduction_factor": 16.0}),
    "prefix": Subject("prefix", {"tokens": 20}),
    "ia3": Subject("ia3", {}),
}
SUBJECTS = {name: subject for name, subject in _SUBJECTS.items() if subject.kind in METHODS}

LIBRARY = {"bottleneck": "adapters"}  # everything else: PEFT
ENVIRONMENTS = {"peft": HERE / ".venv-peft", "adapters": HERE / ".venv-adapters", "lm-eval": HERE / ".venv-lm-eval"}


def ours(batch_tokens: int, *, compiled: bool = False) -> Setup:
    """tritune as it comes: its own choice of format. `compiled`: with `--compile`."""
    return Setup("tritune", "own", "default", "default", batch_tokens, sort=True, tuned=False, compiled=compiled)


def default(method: str) -> Setup:
    """The library's own Trainer, nothing set."""
    return Setup(LIBRARY.get(kind(method), "peft"), "trainer", "default", "default", 8, sort=False, tuned=False)


def trl() -> Setup:
    """TRL as installed."""
    return Setup("peft", "trl", "default", "default", 8, sort=False, tuned=False)


def tuned(method: str, data: str = "short") -> Setup:
    """Where the search for a peer's best settings begins: a bare loop in the middle of the range."""
    middle = SIZES[data][len(SIZES[data]) // 2]
    return Setup(LIBRARY.get(kind(method), "peft"), "own", "float32", "sdpa", middle, sort=True, tuned=True)


def alternatives(method: str, setup: Setup, data: str = "short") -> list[list[Setup]]:
    """What the search tries, one question after the other: format with attention (what is fast in one format is slow in
    another), size of a batch, the library's own loop."""
    formats = SUBJECTS[method].formats
    return [
        [replace(setup, dtype=dtype, attention=name) for dtype in formats for name in ("sdpa", "eager")],
        [replace(setup, batch=rows) for rows in SIZES[data]],
        [setup, replace(setup, loop="trainer")],
    ]


def best(method: str, data: str = "short") -> Setup:
    """The fastest settings found for the peer, or the start of the search where none were looked for."""
    found = _found(data)
    return Setup(**found[kind(method)]) if kind(method) in found else tuned(method, data)


def _found(data: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(BEST[data].read_text(encoding="utf-8")) if BEST[data].exists() else {}
    return found


def kind(method: str) -> str:
    """The peers have one form of each."""
    return SUBJECTS[method].kind


def batch_tokens(method: str, lengths: Sequence[int], data: str = "short") -> int:
    """As many as the best peer takes of rows of these lengths: both learn in as many steps, and hold as much at once."""
    return round(best(method, data).batch * mean(lengths))


def keep_best(found: Mapping[str, Setup], data: str = "short") -> None:
    """Remember what a search found; methods it did not look at stay as they are."""
    known = _found(data) | {method: asdict(setup) for method, setup in found.items()}
    BEST[data].write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def roles(
    method: str, names: list[str], tokens: int | None, lengths: Sequence[int], data: str = "short"
) -> dict[str, Setup]:
    """The sides of one method by the name of their part. TRL has no bottleneck adapters; tuned, it has what the best peer
    has, without its recomputing of activations. `tokens`: of tritune's steps; None: its own."""
    tokens = SUBJECTS[method].step if tokens is None else tokens
    table = {
        "ours": ours(tokens),
        "equal": ours(batch_tokens(method, lengths, data)),
        "compiled": ours(tokens, compiled=True),
        "best": best(method, data),
        "default": default(method),
    }
    if method != "bottleneck":
        table |= {"trl": trl(), "trl-tuned": replace(best(method, data), loop="trl")}
    return {name: table[name] for name in names if name in table}
