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


def page() -> Console:
    """Standard output, for tables and texts."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE
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
