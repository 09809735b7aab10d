"""`make parity`: the comparisons with the reference implementations and the round trips of every format, in one process.

Writes docs/parity.md from what was seen, unless a test failed, only some were asked for, or adapter-hub's package was not
there to answer. A whole run fails too where a variant was not compared on all the bases it should be (`cover.py`). The last
line of standard output is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity.cover import breaches, footnotes
from tests.parity.seen import SEEN, Gaps, Variant

ROOT = Path(__file__).parents[2]
SUITE = ("tests/parity", "tests/unit/exchange")
PAGE = ROOT / "docs" / "parity.md"
#: names a Python with adapter-hub's package; `make parity` makes one
PACKAGE = "TRITUNE_ADAPTERS_PYTHON"
HEAD = """# Largest differences seen

Written by `make parity`. Everything is in float32, on tiny random models of each family and on SmolLM2-135M itself
(`smollm2-135m`).

## Beside the reference implementations

The same weights on both sides, logits of a few rows and the gradients of a weighted sum of them: the largest difference over
all bases, as a share of the largest logit, or of the largest gradient of a tensor (a merge of finished LoRAs has none). 1e-4
is allowed. PEFT runs in the same process, adapter-hub's package (`adapters`) live in its own environment; "transformers" is
autograd on a model of transformers; "formula" is written by hand: adapter-hub's formula in the decoder layers, or the
encoder of a prompt as its origin has it, with the virtual tokens between the embeddings of the words. `opt-post-norm` norms
after the sum (as OPT-350m does); adapter-hub's package reaches it through its plug-in interface.

Every variant is compared on SmolLM2-135M and on at least four families beside its own, one of which norms after the sum; a
run in which one is not fails. Exceptions are listed below the table.

| method | variant | reference | tiny bases | logits | gradients | SmolLM2-135M: logits | gradients |
|---|---|---|---|---|---|---|---|
"""
EXCHANGE = """
## In exchange

For every method, format and base: the largest difference of a logit between the live adaptation and what the format's files
answer, as a share of the largest logit. Files of PEFT's form are answered by PEFT, those of adapter-hub's by its package live
and as it was recorded, merged folders and GGUF models by transformers, GGUF adapters by {gguf}.

| method | format | base | largest relative difference |
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


def page() -> str:
    """The whole of docs/parity.md."""
    cells = (f"| {m} | {f} | {base} | {gap:.1e} |" for (m, f, base), gap in sorted(SEEN.cells.items()))
    by = "llama.cpp and our own reader" if os.environ.get("TRITUNE_LLAMA_PYTHON") else "our own reader"
    return (
        HEAD + "\n".join(variants()) + "\n\n" + footnotes() + "\n" + EXCHANGE.format(gguf=by) + "\n".join(cells) + "\n"
    )


def variants() -> Iterator[str]:
    for variant in sorted({variant for variant, _ in SEEN.variants}):
        tiny = SEEN.variants.get((variant, True))
        families = "-" if tiny is None else ", ".join(sorted(tiny.bases))
        yield f"| {named(variant)} | {families} | {told(tiny)} | {told(SEEN.variants.get((variant, False)))} |"


def named(variant: Variant) -> str:
    return f"{variant.method} | {variant.name} | {variant.reference}"


def told(gaps: Gaps | None) -> str:
    if gaps is None:
        return "- | -"
    return f"{gaps.logits:.1e} | {'-' if gaps.gradients is None else f'{gaps.gradients:.1e}'}"


def main(arguments: list[str]) -> int:
    count = Count()
    code = int(pytest.main(["-p", "no:xdist", *(arguments or SUITE)], plugins=[count]))
    there = bool(os.environ.get(PACKAGE))
    if not there:
        print(f"{PACKAGE} names no Python with adapter-hub's package: recordings answered for it", file=sys.stderr)
    broken = list(breaches(SEEN)) if code == pytest.ExitCode.OK and not arguments and there else []
    for breach in broken:
        print(breach, file=sys.stderr)
    if broken:
        code = 1
    elif code == pytest.ExitCode.OK and not arguments and there:
        PAGE.write_text(page(), encoding="utf-8")
    failed = len(count.failed) + len(broken)
    found = {"cases": count.cases, "failed": failed, "max_relative_difference": SEEN.largest}
    print(json.dumps(found), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
