"""`make parity`: the comparisons with the reference implementations and the round trips of every format, in one process.

Writes docs/parity.md from what was seen, unless a test failed. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.parity.seen import SEEN

ROOT = Path(__file__).parents[2]
SUITE = ("tests/parity", "tests/unit/exchange")
PAGE = ROOT / "docs" / "parity.md"
HEAD = """# Largest differences seen in exchange

Written by `make parity`. For every method, format and family: the largest difference of a logit between the live adaptation
and what the format's files answer, as a share of the largest logit, in float32 on tiny random models. PEFT's column is
answered by PEFT, merged folders and GGUF models by transformers, adapter-hub by recordings of its package (recorded cases) or
our own reader (round trips), GGUF adapters by our own reader.

| method | format | family | largest relative difference |
|---|---|---|---|
"""


class Count:
    """Tests that ran, and those that failed in any phase."""

    def __init__(self) -> None:
        self.cases = 0
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.cases += report.when == "call" and not report.skipped
        if report.failed:
            self.failed.add(report.nodeid)


def main(arguments: list[str]) -> int:
    count = Count()
    code = pytest.main(["-p", "no:xdist", *(arguments or SUITE)], plugins=[count])
    if code == pytest.ExitCode.OK and not arguments:
        rows = (f"| {m} | {f} | {family} | {gap:.1e} |" for (m, f, family), gap in sorted(SEEN.cells.items()))
        PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    found = {"cases": count.cases, "failed": len(count.failed), "max_relative_difference": SEEN.largest}
    print(json.dumps(found), flush=True)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
