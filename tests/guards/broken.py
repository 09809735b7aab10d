"""`make guards`: every guard is green on the code as it is, and red on a copy that has the defect it guards against.

The table is `mutations.py`. Each copy of `src` lies in a temporary folder, and pytest runs on it in a process of its own.
A guard counts as red only where an assertion of its own failed: an import that breaks proves nothing.
Arguments: some words, each of which is in the defects that are tried; none: all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from tests.guards.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
GUARDS = "tests/guards"
#: how an assertion of a test says that it failed
ASSERTION = re.compile(r"AssertionError|assert |Failed: DID NOT RAISE")
#: runs the code of the copy, or says so
RUN = """
import sys, pytest, tritune
sys.exit(pytest.main(sys.argv[2:]) if tritune.__file__.startswith(sys.argv[1]) else f"{tritune.__file__} is not the copy")
"""


@contextmanager
def copied(mutation: Mutation | None) -> Iterator[Path]:
    """A folder with the code, the defect built in.

    Raises:
        SystemExit: the text that is to be replaced is not there exactly once.
    """
    with tempfile.TemporaryDirectory(prefix="tritune-broken-") as scratch:
        src = shutil.copytree(
            ROOT / "src", Path(scratch).resolve() / "src", ignore=shutil.ignore_patterns("*.egg-info")
        )
        if mutation is not None:
            path = src / "tritune" / mutation.file
            text = path.read_text(encoding="utf-8")
            if (n := text.count(mutation.old)) != 1:
                raise SystemExit(f"{mutation.file}: found {n} times, expected once:\n{mutation.old}")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        yield src


def outcomes(src: Path, tests: Sequence[str]) -> dict[str, str]:
    """What pytest says of each test of a copy, by id: "passed", or how it failed.

    Raises:
        SystemExit: pytest could not run.
    """
    found = src.parent / "found.xml"
    arguments = ["-p", "no:xdist", "-p", "no:cacheprovider", "-q", "--tb=short", f"--junitxml={found}", *tests]
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(src), *arguments],
        env={**os.environ, "PYTHONPATH": str(src), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1) or not found.is_file():
        raise SystemExit(f"pytest could not run ({done.returncode}):\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return dict(map(_outcome, ElementTree.parse(found).iter("testcase")))


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    file = case.attrib["classname"].rpartition(".")[2]
    told = next((part.tag, part.attrib.get("message", "")) for part in [*case, ElementTree.Element("passed")])
    return f"{file}.py::{case.attrib['name']}", "passed" if told[0] == "passed" else f"{told[0]}: {told[1]}"


def verdict(mutation: Mutation) -> list[str]:
    """What is wrong with this mutation's guards: nothing, if all are red by an assertion of their own."""
    with copied(mutation) as src:
        seen = outcomes(src, [f"{GUARDS}/{test}" for test in mutation.red])
    return [
        f"{test}: {seen.get(test, 'did not run')[:300]}"
        for test in mutation.red
        if not (seen.get(test, "").startswith("failure: ") and ASSERTION.search(seen[test]))
    ]


def unguarded(tests: Iterable[str], mutations: Sequence[Mutation]) -> list[str]:
    """Guards that no mutation turns red, in none of their cases."""
    red = {test.partition("[")[0] for mutation in mutations for test in mutation.red}
    return sorted({test.partition("[")[0] for test in tests} - red)


def main(words: Sequence[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if all(word in mutation.defect for word in words)]
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool, copied(None) as src:
        whole = pool.submit(outcomes, src, [GUARDS])
        found = list(pool.map(verdict, chosen))
        green = whole.result()
    wrong = [f"on the code as it is, {test}: {how[:300]}" for test, how in green.items() if how != "passed"]
    if not words:
        wrong += [f"no mutation turns this guard red: {test}" for test in unguarded(green, MUTATIONS)]
    for mutation, problems in zip(chosen, found, strict=True):
        print(f"{'NOT RED' if problems else 'red'}: {mutation.defect}; {len(mutation.red)} tests")
        wrong += [f"on a copy where {mutation.defect}, not red by its own assertion: {each}" for each in problems]
    print("\n".join([*wrong, f"{len(chosen)} defects, {len(green)} guards, {time.perf_counter() - began:.0f} seconds"]))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
