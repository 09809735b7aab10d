"""The command line. One file per command; what they share: options, settings, progress, folders.

Everything heavy is imported inside the commands, so that help and usage errors need no torch.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper


def main() -> None:
    """The entry point of the `tritune` command."""
    # Large pages for torch's large tensors: fewer address look-ups in matrix products. Read at the first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    from tritune.allocator import keep_freed_memory
    from tritune.cli.app import app

    keep_freed_memory()

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an odd console must not stop hours of work
    app(prog_name="tritune")
