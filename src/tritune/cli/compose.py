"""`tritune compose`: finished adaptations of one base are stacked, merged into one LoRA, or fused by learned attention."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritune.cli import fusing, given, options
from tritune.cli.compare import command_of
from tritune.cli.language import language
from tritune.cli.loading import load_adaptations, stored_at
from tritune.cli.progress import shown
from tritune.cli.run_folder import RunFolder
from tritune.cli.screen import echo_json, page
from tritune.cli.train import Resume, tell
from tritune.errors import Mismatch, Problem
from tritune.recipes.settings import FuseSettings

if TYPE_CHECKING:
    from tritune.adaptation import Adaptation
    from tritune.spec import MethodConfig
    from tritune.store.registry import Stored
    from tritune.tasks.base import Task

HELP = """Put finished adaptations of one base together; `tritune compose HOW --help` tells of each way.

Example:
  tritune compose stack runs/prompt runs/lora --out runs/both
"""

app = typer.Typer(no_args_is_help=True, help=HELP, rich_markup_mode="rich")

Parts = Annotated[
    list[str],
    typer.Argument(help="Folders, or beginnings of content hashes.", metavar="ADAPTATION...", show_default=False),
]
PartsOrNone = Annotated[
    list[str] | None,
    typer.Argument(help="Folders, or beginnings of content hashes.", metavar="ADAPTATION...", show_default=False),
]
TaskOf = Annotated[
    int | None,
    typer.Option("--task-of", help="Whose task is kept, where they differ: 1 for the first.", metavar="N", min=1),
]
How = Annotated[str, typer.Option("--how", help="linear (exact), svd, ties, dare_linear or dare_ties.")]
Weights = Annotated[
    str | None, typer.Option("--weights", help="One per adaptation; else the average.", metavar="NUMBER,...")
]
Rank = Annotated[int | None, typer.Option("--rank", help="Of the result; else the largest of the parts.")]
Density = Annotated[float | None, typer.Option("--density", help="Share of numbers that ties and dare keep.")]
DrawSeed = Annotated[int, typer.Option("--seed", help="Seed of what dare draws.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the run.", rich_help_panel=options.TRAINING)]
NoValue = Annotated[bool, typer.Option("--no-value", help="Weigh the outputs as they are, without a matrix behind.")]


@app.command()
def stack(
    adaptations: Parts,
    out: options.Folder,
    task_of: TaskOf = None,
    base: options.BaseNow = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """All answer every row together, each upon those before it: a prompt with a LoRA, scales with a LoRA.

    Example:
      tritune compose stack runs/prompt runs/lora --out runs/both
    """
    with shown(quiet=quiet) as progress:
        from tritune.composition import stacking

        stored = _stored(adaptations, out, "stacked", stacking.reasons, task_of=task_of)
        parts = load_adaptations(stored, progress, base=base, device=device)
        _finish(stacking.stack(parts, task=_task_of(parts, task_of)), out, as_json=as_json)


@app.command()
def merge(
    adaptations: Parts,
    out: options.Folder,
    how: How = "linear",
    weights: Weights = None,
    rank: Rank = None,
    density: Density = None,
    seed: DrawSeed = 0,
    task_of: TaskOf = None,
    base: options.BaseNow = None,
    device: options.Device = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """One ordinary LoRA from several: their weighted sum, exact or in a given rank, TIES, DARE.

    Example:
      tritune compose merge runs/a runs/b --how ties --density 0.2 --out runs/merged
    """
    numbers = None if weights is None else _numbers(weights)
    with shown(quiet=quiet) as progress:
        from tritune.composition import merging

        def reasons(configs: Sequence[MethodConfig]) -> Iterator[Problem]:
            yield from merging.not_low_rank(configs)
            for problem in merging.wrong_options(how, len(configs), numbers, rank, density):
                yield Problem(given.option(problem.where), problem.what)

        stored = _stored(adaptations, out, "merged", reasons, task_of=task_of)
        parts = load_adaptations(stored, progress, base=base, device=device)
        found = merging.merge(
            parts,
            how,  # type: ignore[arg-type]  # checked there, with everything else
            weights=numbers,
            rank=rank,
            density=density,
            seed=seed,
            task=_task_of(parts, task_of),
        )
        error = {"error": found.error, "worst": found.worst}
        line = f"cut to its rank it is off by {found.error:.2%} of the change ({found.worst:.2%} at the worst place)"
        _finish(found.adaptation, out, as_json=as_json, more=error, line=line if found.error else "exact")


@app.command()
def fuse(
    ctx: typer.Context,
    out: options.Folder,
    adaptations: PartsOrNone = None,
    resume: Resume = False,
    train: options.Train = None,
    test: options.Test = None,
    dev: options.Dev = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    label_words: options.LabelWords = None,
    template: options.Template = None,
    train_rows: options.TrainRows = None,
    dev_rows: options.DevRows = None,
    test_rows: options.TestRows = None,
    data_seed: options.DataSeed = None,
    allow_duplicates: options.AllowDuplicates = None,
    epochs: options.Epochs = None,
    batch_tokens: options.BatchTokens = None,
    learning_rate: options.LearningRate = None,
    evaluations: options.Evaluations = None,
    seed: Seed = None,
    no_value: NoValue = False,
    base: options.BaseNow = None,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    lang: options.Lang = None,
) -> None:
    """Train attention over finished bottleneck adapters; they stay as they are, and go into the result.

    --out becomes a run folder, as that of `tritune train`. Ctrl-C keeps the state; --resume goes on from it.

    Example:
      tritune compose fuse runs/a runs/b runs/c --train train.csv \\
        --text-field review --label-field sentiment --out runs/fused
      tritune compose fuse --resume --out runs/fused
    """
    folder = RunFolder(out)
    recorded = str(folder.begun()) if resume else None
    settings = given.settings(FuseSettings, ctx.params, recorded, {"value": False} if no_value else {})
    with shown(quiet=quiet, lang=language(lang)) as progress:
        if resume and folder.finished:
            progress.say(f"{out} is finished; there is nothing to resume.")
        else:
            where = settings.base if resume else base
            fusing.run(
                settings, where, folder, progress, language(lang), command_of(ctx), resume=resume, overwrite=overwrite
            )
    tell(folder, as_json=as_json)


def _stored(
    refs: Sequence[str],
    out: Path,
    way: str,
    reasons: Callable[[Sequence[MethodConfig]], Iterable[Problem]],
    *,
    task_of: int | None,
) -> list[Stored]:
    """The adaptations meant, with everything checked that needs no base.

    Raises:
        Mismatch: with every reason why they cannot be put together so; or the place is taken.
        StorageError: nothing may be written there.
    """
    from tritune.composition.parts import check_stored
    from tritune.store.registry import check_place

    check_place(out)
    number = task_of or 1
    fits = () if number <= len(refs) else [Problem("--task-of", f"{number}, but there are {len(refs)} adaptations")]
    Mismatch.check("There is no such adaptation.", fits)
    every = [stored_at(ref) for ref in refs]
    check_stored(way, every, reasons, task_named=task_of is not None)
    return every


def _task_of(parts: list[Adaptation], number: int | None) -> Task | None:
    return None if number is None else parts[number - 1].task


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not NUMBER,...", param_hint="--weights") from None


def _finish(
    adaptation: Adaptation, out: Path, *, as_json: bool, more: dict[str, float] | None = None, line: str = ""
) -> None:
    stored = adaptation.save(out)
    if as_json:
        facts = {"folder": str(out), "id": stored.id, "method": stored.manifest.method, "made": stored.manifest.made}
        echo_json({**facts, **(more or {})})
        return
    lines = [f"{out}: {stored.manifest.method}", *([line] if line else ())]
    page().print("\n".join([*lines, f'\n  tritune predict {shlex.quote(str(out))} "your text"']), soft_wrap=True)
