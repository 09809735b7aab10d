"""`tritune predict`: answers of a stored adaptation to texts, a file of rows, or standard input."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tritune.cli import options
from tritune.cli.loading import load_adaptation, stored_at
from tritune.cli.progress import shown
from tritune.cli.screen import echo_json
from tritune.errors import BadData, Problem
from tritune.tasks.base import Example
from tritune.tasks.classification import Classification
from tritune.tasks.stored import task_from_document

if TYPE_CHECKING:
    from tritune.adaptation import Prediction
    from tritune.store.registry import Stored

Texts = Annotated[
    list[str] | None, typer.Argument(help="Texts; none: one per line from standard input.", metavar="TEXT...")
]
File = Annotated[
    str | None,
    typer.Option("--file", help="Rows to answer: .csv, .tsv, .jsonl or .parquet.", rich_help_panel=options.DATA),
]


def predict(
    adaptation: options.Adaptation,
    texts: Texts = None,
    file: File = None,
    text_field: options.TextFieldNow = None,
    base: options.BaseNow = None,
    device: options.Device = None,
    quantise: options.QuantiseNow = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer texts with a stored adaptation: label, its share among all labels, text.

    Example:
      tritune predict 4f2a9c "an instant classic"
      tritune predict 4f2a9c --file new.csv --json
    """
    rows: list[Example] = []

    def task(stored: Stored) -> Classification:
        found = task_from_document(stored.manifest.task)
        source = file if file is not None else _texts(texts)
        rows.extend(found.unlabelled(source, text=text_field, progress=progress.say))
        return found

    if file is not None and texts:
        raise typer.BadParameter("give either texts or --file", param_hint="TEXT...")
    with shown(quiet=quiet) as progress:
        loaded = load_adaptation(
            stored_at(adaptation), task, progress, base=base, device=device, quantise=options.form_now(quantise)
        )
        answers = loaded.predict_examples(rows, progress=progress)
    if as_json:
        echo_json([_document(answer) for answer in answers])
    else:
        typer.echo("\n".join(_line(answer) for answer in answers))


def _texts(given: list[str] | None) -> list[str]:
    """The texts of the command line, else the lines of standard input.

    Raises:
        BadData: there are none.
    """
    if given:
        return given
    lines = [] if sys.stdin.isatty() else sys.stdin.read().splitlines()
    BadData.check(
        "There is nothing to answer.",
        () if lines else [Problem("TEXT", "no text was given, and standard input holds none")],
        "Give texts, --file FILE, or pipe one text per line.",
    )
    return lines


def _document(answer: Prediction) -> dict[str, object]:
    return {"text": answer.text, "label": answer.label, "probabilities": dict(answer.probabilities)}


def _line(answer: Prediction) -> str:
    share = answer.probabilities.get(answer.label, 0.0)
    return f"{answer.label}\t{share:.3f}\t{' '.join(answer.text.split())}"
