"""`tritune check`: what is read and what is trained, token by token, and everything that is wrong with the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from tritune.cli import given, options, token_view
from tritune.cli.loading import load_base, load_task, require
from tritune.cli.progress import shown
from tritune.cli.screen import page
from tritune.errors import Mismatch, Problem
from tritune.recipes.settings import CheckSettings
from tritune.tasks.base import Split
from tritune.tasks.classification import Classification

if TYPE_CHECKING:
    from tritune.models.pretrained import Base
    from tritune.text.encode import Encoded

Rows = Annotated[int, typer.Option("--rows", help="So many rows are shown token by token.", min=0)]


def check(
    ctx: typer.Context,
    rows: Rows = 3,
    recipe: options.Recipe = None,
    base: options.Base = None,
    device: options.Device = None,
    train: options.Train = None,
    test: options.Test = None,
    dev: options.Dev = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    labels: options.Labels = None,
    label_words: options.LabelWords = None,
    template: options.Template = None,
    train_rows: options.TrainRows = None,
    dev_rows: options.DevRows = None,
    test_rows: options.TestRows = None,
    data_seed: options.DataSeed = None,
    allow_duplicates: options.AllowDuplicates = None,
    quiet: options.Quiet = False,
) -> None:
    """Show which tokens are read and which are trained, and what is wrong with the data.

    Trains nothing. Exit code 2 when there is a problem.

    Example:
      tritune check --train train.csv --text-field review --label-field sentiment
    """
    settings = given.settings(CheckSettings, ctx.params, recipe)
    require(settings, "train")
    console = page()
    with shown(quiet=quiet) as progress:
        try:
            task = load_task(settings, progress)
        except Mismatch as error:
            _problems(console, error.title, error.problems, error.hint)
            raise typer.Exit(error.exit_code) from None
        found = load_base(settings.base, settings.dtype, settings.device, progress)
    token_view.data(console, task)
    encoded, problems = _encoded(task, found)
    token_view.rows(console, found.tokenizer, [pair for pairs in encoded.values() for pair in pairs][:rows])
    token_view.lengths(console, {split: [row.n_trained for _, row in pairs] for split, pairs in encoded.items()}, found)
    _problems(console, "Problems", problems)
    if problems:
        raise typer.Exit(Mismatch.exit_code)


def _encoded(task: Classification, base: Base) -> tuple[dict[Split, list[tuple[str, Encoded]]], list[Problem]]:
    """Every row that can be used, with its place, and what is wrong with the others."""
    from tritune.adaptation import encoder_for
    from tritune.evaluate import examples

    encoder = encoder_for(base)
    problems: list[Problem] = []
    found: dict[Split, list[tuple[str, Encoded]]] = {}
    for split in Split:
        good = list(task.examples(split))
        try:
            encoded = examples.encode(task, good, encoder)
        except Mismatch as error:
            problems += error.problems
            bad = {problem.where for problem in error.problems}
            good = [example for example in good if example.where not in bad]
            encoded = examples.encode(task, good, encoder)
        found[split] = [(row.where, ids) for row, ids in zip(encoded.examples, encoded.encoded, strict=True)]
    return found, problems


def _problems(console: Console, title: str, problems: Sequence[Problem], hint: str = "") -> None:
    """All of them, however many."""
    console.print(f"\n{title}" if problems else "\nNo problems found.", style="bold red" if problems else "bold green")
    for problem in problems:
        console.print(f"  - {problem}", soft_wrap=True)
    if hint:
        console.print(hint, soft_wrap=True)
