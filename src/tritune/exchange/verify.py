"""An exchanged folder answers as the live adaptation does, or it does not count: logits compared on a few rows.

The other side answers in a process of its own, through its own library, from the files alone; it never sees our code.
Both sides compute in float32, whatever the base is used in: in bfloat16 rounding alone moves a logit of 40 by more than 1,
and what was forgotten could hide behind it.
Shapes: T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch
from tritune.exchange.format import SCRIPTS, Absent, Format
from tritune.methods import method_of
from tritune.models.base import Batch, Edits, NoEdits, Span
from tritune.models.load import load_base
from tritune.models.pretrained import Base
from tritune.spec import Quantisation
from tritune.store.files import read_tensors

#: what is compared on, where the user has no rows at hand: short and long, several scripts, digits, code
SAMPLE = (
    "The film was a quiet triumph from its first scene to its last.",
    "Нет.",
    "Überraschend gut – 7 of 10 points, 3.5 stars, #42!",
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "他说这部电影很好看。 映画はとても良かった。",
    "To be sold: two chairs, one table, barely used, and the strangest lamp that I have ever seen in my whole life.",
)

#: exit code of a script whose library is not installed
ABSENT = 77


@dataclass(frozen=True, slots=True)
class Verdict:
    """How two answers compare.

    Attributes:
        by: what answered ("peft 0.21.2").
        rows, tokens: how much was compared.
        difference: largest difference of any logit.
        largest: largest logit, so that the difference means something.
        effect: by how much the adaptation moves a logit of the bare base at most.
        bound: largest difference allowed, as a share of `largest`.
    """

    by: str
    rows: int
    tokens: int
    difference: float
    largest: float
    effect: float
    bound: float

    @property
    def holds(self) -> bool:
        """Equal within the bound, and nearer to the adaptation than to the bare base, where those can be told apart."""
        allowed = self.bound * self.largest
        return self.difference <= allowed and (self.effect <= allowed or self.difference <= self.effect / 2)

    def __str__(self) -> str:
        said = (
            f"largest difference of a logit {self.difference:.2g} by {self.by}, {self.rows} rows, {self.tokens} tokens "
            f"(largest logit {self.largest:.3g}, allowed {self.bound * self.largest:.2g}; "
            f"the adaptation moves logits by up to {self.effect:.3g})"
        )
        return (
            said if self.effect > self.bound * self.largest else f"{said}. It hardly moves the base: this says little"
        )


def sample_rows(base: Base, virtual: int = 0) -> list[list[int]]:
    """Token ids of the sample, cut to what the base takes behind so many virtual tokens."""
    room = base.max_positions - virtual
    return [ids[:room] for text in SAMPLE if (ids := base.tokenizer(text, add_special_tokens=False)["input_ids"])]


@torch.no_grad()
def logits_of(base: Base, edits: Edits, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Our own logits (T, V) of every row."""
    starts = [sum(map(len, rows[:i])) for i in range(len(rows))]
    spans = tuple(Span(start, len(row)) for start, row in zip(starts, rows, strict=True))
    batch = Batch(torch.tensor([token for row in rows for token in row]), spans)
    with base.bind(edits):
        logits = base.logits(batch, torch.arange(len(batch.tokens_N)))
    return list(torch.split(logits.cpu(), [len(row) for row in rows]))


def reference_logits(
    script: str, folder: Path, base: Path, rows: Sequence[Sequence[int]], device: str, python: str | None = None
) -> tuple[list[Tensor], str]:
    """Logits (T, V) of every row by the reference library, and what it calls itself.

    Args:
        script: name of a file in `reference/`.
        folder: what was exported, or is to be imported.
        base: folder of its base.
        python: an interpreter that has the library; None: this one.

    Raises:
        Absent: the library is not installed there.
        Mismatch: it could not read the folder; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="tritune-") as scratch:
        out = Path(scratch) / "logits.safetensors"
        job = {
            "folder": str(folder.absolute()),
            "base": str(base),
            "rows": [list(map(int, row)) for row in rows],
            "dtype": "float32",
            "device": device,
            "out": str(out),
        }
        path = Path(scratch) / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                [python or sys.executable, str(SCRIPTS / script), str(path)],
                env={**os.environ, **quiet},
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise Absent(f"{python} cannot be started: {error.strerror}") from None
        if done.returncode == ABSENT:
            raise Absent(done.stdout.strip())
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise Mismatch(f"The reference library could not read {folder}; it said:\n{said}")
        found = read_tensors(out)
        return [found[str(i)] for i in range(len(rows))], done.stdout.strip().splitlines()[-1]


@contextmanager
def in_float32(base: Base, form: Quantisation | None = None) -> Iterator[tuple[Base, Path]]:
    """The base in float32 with its weights in this form, and the folder where a reference finds the weights that are not
    quantised; those of a base made in memory are written."""
    same = base.dtype is torch.float32 and base.quantised == form
    if base.located is not None:
        folder = base.located.folder
        yield (base if same else _reloaded(base, folder, form)), folder
        return
    with tempfile.TemporaryDirectory(prefix="tritune-base-") as scratch:
        folder = Path(scratch)
        base.save_pretrained(folder, base.parameters())
        yield (base if same else _reloaded(base, folder, form)), folder


def _reloaded(base: Base, folder: Path, form: Quantisation | None) -> Base:
    again = load_base(folder, dtype="float32", device=str(base.device), quantise=form)
    again.name, again.digests = base.name, base.digests
    return again


def _form(chosen: Format, base: Base) -> Quantisation | None:
    """The form of the base that an exchanged folder has to answer like."""
    return base.quantised if chosen.whole else None


def compare(live: Sequence[Tensor], theirs: Sequence[Tensor], bare: Sequence[Tensor], by: str, bound: float) -> Verdict:
    """The verdict on two answers to the same rows; `bare`: the base's own."""
    return Verdict(
        by=by,
        rows=len(live),
        tokens=sum(len(row) for row in live),
        difference=_furthest(live, theirs),
        largest=max(float(row.abs().max()) for row in live),
        effect=_furthest(live, bare),
        bound=bound,
    )


def _furthest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Infinite where one is not finite or the shapes differ."""
    gaps = [
        float((x.float() - y.float()).abs().max()) if x.shape == y.shape else float("inf")
        for x, y in zip(a, b, strict=True)
    ]
    return max((gap if gap == gap else float("inf")) for gap in gaps)


def verify(
    chosen: Format, folder: Path, adaptation: Adaptation, rows: Sequence[Sequence[int]], python: str | None = None
) -> Verdict:
    """The verdict of the format's reference library on a folder.

    Raises:
        Absent: it is not installed.
        Mismatch: it could not read the folder.
    """
    with (
        in_float32(adaptation.base, _form(chosen, adaptation.base)) as (base, place),
        tempfile.TemporaryDirectory(prefix="tritune-reference-") as scratch,
    ):
        given, ground = chosen.for_reference(folder, adaptation.base, place, Path(scratch))
        theirs, by = reference_logits(chosen.script, given, ground, rows, str(base.device), python)
        live, bare = own_logits(adaptation, base, rows)
    return compare(live, theirs, bare, by, chosen.bound(adaptation.base))


def verify_by_ourselves(
    chosen: Format, folder: Path, adaptation: Adaptation, rows: Sequence[Sequence[int]], why: str
) -> Verdict:
    """The verdict of our own importer, where the reference is not installed.

    Raises:
        Mismatch: the format cannot be read, or this folder not.
    """
    with in_float32(adaptation.base, _form(chosen, adaptation.base)) as (base, _):
        incoming = chosen.read(folder, base)
        again = method_of(incoming.config).load(incoming.config, base, incoming.tensors).eval()
        live, bare = own_logits(adaptation, base, rows)
        theirs = logits_of(base, again, rows)
    return compare(live, theirs, bare, f"tritune's own importer ({why})", chosen.bound(adaptation.base))


def own_logits(adaptation: Adaptation, base: Base, rows: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the live adaptation on this form of its base, and of the bare base."""
    delta = adaptation.delta
    if base is not adaptation.base:
        delta = adaptation.method.load(adaptation.config, base, delta.export()).eval()
    return logits_of(base, delta, rows), logits_of(base, NoEdits(), rows)
