"""Lets a reference library answer several folders in one process: starting it takes longer than answering.

Usage: OTHER/python answer_many.py SCRIPT JOBS.json   (SCRIPT: one of `exchange/reference`; a list of the jobs it takes)
Knows nothing of tritune.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    main = runpy.run_path(sys.argv[1])["main"]
    for job in json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")):
        main(job)
