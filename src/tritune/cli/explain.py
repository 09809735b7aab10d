"""`tritune explain`: each strategy in plain words, with a comparison's own figures where one is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from tritune.cli import options
from tritune.cli.comparison_folder import read
from tritune.cli.language import language
from tritune.cli.screen import page
from tritune.report.explain import Explained
from tritune.report.explain import explain as explained

NAMES: tuple[str, ...] = get_args(Explained)

Strategy = Annotated[
    str | None,
    typer.Argument(help=f"{', '.join(NAMES)}; none: all of them in short.", metavar="STRATEGY", show_default=False),
]
Run = Annotated[
    Path | None,
    typer.Option("--run", help="Folder of a comparison whose figures are told too.", rich_help_panel=options.OUTPUT),
]


def explain(strategy: Strategy = None, run: Run = None, lang: options.Lang = None) -> None:
    """Say in plain words what each strategy is, what moves, what is stored, when to take it.

    Example:
      tritune explain adapters --run runs/demo
    """
    if strategy is not None and strategy not in NAMES:
        raise typer.BadParameter(f"'{strategy}' is none of {', '.join(NAMES)}", param_hint="STRATEGY")
    text = explained(cast("Explained | None", strategy), language(lang), None if run is None else read(run))
    console = page()
    if console.is_terminal:
        from rich.markdown import Markdown

        console.print(Markdown(text))
    else:
        typer.echo(text, nl=False)
