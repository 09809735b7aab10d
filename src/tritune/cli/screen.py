"""Standard output for results and standard error for complaints. A user's text is never read as markup."""

from __future__ import annotations

import json
import os
import sys

import typer
from rich.console import Console
from rich.text import Text

#: columns of a table that is not shown on a terminal
WIDE = 120


def page(width: int | None = None) -> Console:
    """Standard output, for tables and texts; so many columns wide, or as it is."""
    if width is None and not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        width = WIDE
    return Console(width=width, highlight=False, markup=False, emoji=False)


def complain(message: str) -> None:
    """Say on standard error what went wrong; the first line stands out."""
    first, newline, rest = message.partition("\n")
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble((first, "bold red"), newline, rest), soft_wrap=True)


def echo_json(data: object) -> None:
    """One JSON document on standard output; ASCII only where the output could not show more."""
    plain = (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8"
    typer.echo(json.dumps(data, ensure_ascii=plain, indent=2, allow_nan=False))
