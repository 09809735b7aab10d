"""`tritune train`: one method on one base, in a run folder that survives being stopped or killed at any moment."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from tritune.cli import given, options
from tritune.cli.compare import command_of
from tritune.cli.language import language
from tritune.cli.progress import shown
from tritune.cli.run_folder import METRICS, RunFolder
from tritune.cli.screen import echo_json, page
from tritune.cli.training import run
from tritune.recipes.settings import TrainSettings
from tritune.report import units
from tritune.store.files import read_json

Method = Annotated[str | None, typer.Option("--method", help="One of {methods}.", rich_help_panel=options.TRAINING)]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of the method; repeat as needed.",
        metavar="KEY=VALUE",
        rich_help_panel=options.TRAINING,
    ),
]
Seed = Annotated[
    int | None, typer.Option("--seed", help="Start values and order of the rows.", rich_help_panel=options.TRAINING)
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=options.OUTPUT)]


def train(
    ctx: typer.Context,
    out: options.Folder,
    recipe: options.Recipe = None,
    resume: Resume = False,
    base: options.Base = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantise: options.QuantiseBase = None,
    compiled: options.Compiled = None,
    cuda_graphs: options.CudaGraphs = None,
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
    method: Method = None,
    changes: Changes = None,
    seed: Seed = None,
    epochs: options.Epochs = None,
    learning_rate: options.LearningRate = None,
    batch_tokens: options.BatchTokens = None,
    accumulate: options.Accumulate = None,
    evaluations: options.Evaluations = None,
    patience: options.Patience = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    lang: options.Lang = None,
) -> None:
    """Adapt a base by one method, without comparing.

    Ctrl-C stops after the current step and keeps the state; --resume goes on from it.
    The state of a method that moves every weight is several times the base's size.

    Example:
      tritune train --train train.csv --text-field review \\
        --label-field sentiment --method {method} --out runs/one
      tritune train --resume --out runs/one
    """
    folder = RunFolder(out)
    if resume and recipe is not None:
        raise typer.BadParameter("a resumed run has its own settings", param_hint="--config")
    config = {"config": given.assignments(changes)} if changes else {}
    below = str(folder.begun()) if resume else recipe
    settings = given.settings(TrainSettings, ctx.params, below, config)
    with shown(quiet=quiet, lang=language(lang)) as progress:
        if resume and folder.finished:
            progress.say(f"{out} is finished; there is nothing to resume.")
        else:
            run(settings, folder, progress, language(lang), command_of(ctx), resume=resume, overwrite=overwrite)
    tell(folder, as_json=as_json)


def tell(folder: RunFolder, *, as_json: bool) -> None:
    """What a finished run reached, on standard output."""
    metrics = read_json(folder.path / METRICS)
    if as_json:
        echo_json(metrics)
        return
    lines = [f"{metrics['method']}, best of {metrics['steps']} steps: step {metrics['best_step']}"]
    for split in ("dev", "test"):
        if found := metrics[split]:
            score, low, high = (units.score(found[key], "en") for key in ("score", "low", "high"))
            lines.append(f"{split}: {metrics['metric']} {score} [{low}, {high}] (95 %, n = {found['n']})")
    lines.append(f"stored: {units.size(metrics['stored_bytes'], 'en')} in {folder.adaptation}")
    lines.append(f'\n  tritune predict {shlex.quote(str(folder.path))} "your text"')
    page().print("\n".join(lines), soft_wrap=True)
