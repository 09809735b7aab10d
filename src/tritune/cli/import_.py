"""`tritune import`: a folder of another package becomes an adaptation that predict, eval and show take."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritune.cli import given, options
from tritune.cli.export import document
from tritune.cli.loading import load_base
from tritune.cli.progress import shown
from tritune.cli.screen import echo_json, page
from tritune.recipes.settings import Settings
from tritune.tasks.classification import Classification, described

if TYPE_CHECKING:
    from tritune.exchange.inward import Imported
    from tritune.store.registry import Stored

Source = Annotated[Path, typer.Argument(help="As PEFT or adapter-hub wrote it.", metavar="FOLDER", show_default=False)]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="All labels that it tells apart; not needed for what tritune exported.",
        metavar="LABEL,...",
        rich_help_panel=options.DATA,
    ),
]
Base = Annotated[
    str,
    typer.Option(
        "--base",
        help="The base model that FOLDER was trained on, which is not in there: "
        "a packaged name, another folder, a GGUF file or a Hub id.",
        rich_help_panel=options.BASE,
        show_default=False,
    ),
]
SameBase = Annotated[
    bool,
    typer.Option(
        "--same-base",
        help="Take --base for the right one, though FOLDER knows its base by another name.",
        rich_help_panel=options.BASE,
    ),
]


def import_(
    ctx: typer.Context,
    folder: Source,
    base: Base,
    out: options.Folder,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantise: options.QuantiseBase = None,
    same_base: SameBase = False,
    labels: Labels = None,
    label_words: options.LabelWords = None,
    template: options.Template = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    reference: options.ReferencePython = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Read an adaptation that another package trained.

    Unknown settings, missing or surplus tensors and another base are errors, all told at once.
    The other package does not store what answers mean: say it with --labels and, as in training,
    --label-words, --template and --text-field. Where that package is installed, both sides
    answer a sample and are compared.

    Example:
      tritune import their-folder --base my-base --labels negative,positive --out runs/theirs
    """
    settings = given.settings(Settings, ctx.params)
    task = _task(settings)
    with shown(quiet=quiet) as progress:
        from tritune.exchange.inward import check, import_folder
        from tritune.store.registry import check_place

        check_place(out)
        check(folder, task)
        loaded = load_base(settings.base, settings.dtype, settings.device, progress, settings.quantise)
        progress.stage("import and verify", 0, "")
        done = import_folder(folder, loaded, task, same_base=same_base, python=reference)
        stored = done.adaptation.save(out)
    if as_json:
        verified = None if done.verdict is None else document(done.verdict)
        echo_json(
            {"folder": str(out), "id": stored.id, "format": done.format, "notes": done.notes, "verified": verified}
        )
    else:
        _tell(done, stored)


def _task(settings: Settings) -> Classification | None:
    """The task that the options describe; None: they describe none."""
    named = (settings.label_words, settings.template)
    if settings.labels is None:
        if any(value is not None for value in named):
            raise typer.BadParameter("say which labels there are", param_hint="--labels")
        return None
    return described(
        settings.labels,
        label_words=settings.label_words,
        template=settings.template,
        text=settings.text_field,
        label=settings.label_field,
    )


def _tell(done: Imported, stored: Stored) -> None:
    lines = [f"{stored.folder}: {done.adaptation.method.kind}, from {done.format}", *(f"note: {n}" for n in done.notes)]
    if done.verdict is None:
        lines.append("not verified: the package that wrote it is not installed here")
    else:
        lines.append(f"verified: {done.verdict}")
    lines.append(f'\n  tritune predict {shlex.quote(str(stored.folder))} "your text"')
    page().print("\n".join(lines), soft_wrap=True)
