"""The commands together, and what becomes of errors: a message and an exit code for ours, a traceback for bugs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tritune.cli.check import check
from tritune.cli.compare import compare
from tritune.cli.compose import app as compose
from tritune.cli.demo import demo
from tritune.cli.eval import evaluate
from tritune.cli.explain import explain
from tritune.cli.export import export
from tritune.cli.import_ import import_
from tritune.cli.list import list_stored
from tritune.cli.predict import predict
from tritune.cli.screen import complain
from tritune.cli.show import show
from tritune.cli.train import train
from tritune.errors import TrituneError
from tritune.methods import METHODS

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Commands(TyperGroup):
    """All commands; errors raised on purpose become a message on standard error and their exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.obj = tuple(args)  # what was typed, for the records
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TrituneError as error:
            complain(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            complain("Stopped.")
            raise typer.Exit(INTERRUPTED) from None


class Command(TyperCommand):
    """A command whose help names the methods that the table has when the command line is built."""

    def __init__(self, name: str | None, **attributes: Any) -> None:
        super().__init__(name, **attributes)
        told: list[Any] = [self, *self.params]
        for one in told:
            if text := getattr(one, "help", None):
                one.help = text.replace("{methods}", ", ".join(METHODS)).replace("{method}", next(reversed(METHODS)))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo", cls=Command)(demo)
app.command("compare", cls=Command)(compare)
app.command("train", cls=Command)(train)
app.command("eval", cls=Command)(evaluate)
app.command("predict", cls=Command)(predict)
app.command("list", cls=Command)(list_stored)
app.command("show", cls=Command)(show)
app.add_typer(compose, name="compose")
app.command("export", cls=Command)(export)
app.command("import", cls=Command)(import_)
app.command("explain", cls=Command)(explain)
app.command("check", cls=Command)(check)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tritune {version('tritune')}")
        raise typer.Exit


@app.callback()
def tritune(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Adapt one language model three ways, compare them honestly on your data, use the result.

    Start with:  tritune demo
    Then:        tritune compare --train train.csv --test test.csv \\
                   --text-field text --label-field label --out runs/mine
    """
