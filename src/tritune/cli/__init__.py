"""The command line. One file per command; what they share: options, settings, progress, folders.

Everything heavy is imported inside the commands, so that help and usage errors need no torch.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path


def main() -> None:
    """The entry point of the `tritune` command."""
    from tritune.process import settle, start_over

    if Path(sys.argv[0]).stem == "tritune" and sys.argv[0] in sys.orig_argv:  # not in a program that calls this
        start_over()
    settle()

    from tritune.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an odd console must not stop hours of work
    app(prog_name="tritune")
