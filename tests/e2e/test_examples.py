"""The examples of the help texts, on files whose columns are called as they say."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.e2e.conftest import REVIEWS, Run, rows, write
from tritune.cli.app import app

QUICK = ["--epochs", "1", "--evaluations", "1"]


def example(*command: str) -> list[str]:
    """The words of the first example in a command's help, without the name of the program."""
    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    line = found.help.partition("Example:")[2].replace("\\\n", " ").strip().splitlines()[0]
    return shlex.split(line)[1:]


@pytest.fixture(scope="module")
def place(base: Path, tritune: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the examples and three adapters."""
    folder = tmp_path_factory.mktemp("examples")
    for name, n in (("train", 48), ("test", 20)):
        content = [{"review": row["body"], "sentiment": row["topic"]} for row in rows(REVIEWS, n, n)]
        write(folder / f"{name}.csv", content)
    columns = ["--text-field", "review", "--label-field", "sentiment"]
    options = ["--base", base, "--train", folder / "train.csv", *columns, "--method", "bottleneck", *QUICK, "-q"]
    assert tritune("train", *options, "--out", folder / "runs" / "a").code == 0
    for name in ("b", "c"):
        shutil.copytree(folder / "runs" / "a", folder / "runs" / name)
    return folder


@pytest.mark.parametrize(
    ("command", "more"),
    [
        (("check",), []),
        (("train",), QUICK),
        (("compare",), [*QUICK, "--methods", "lora", "--rates", "1", "--shots", "0", "--train-rows", "40"]),
        (("eval",), []),
        (("compose", "fuse"), QUICK),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_example_runs(
    command: tuple[str, ...],
    more: list[str],
    place: Path,
    base: Path,
    tritune: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    words = ["runs/a" if word == "4f2a9c" else word for word in example(*command)]
    assert {"--text-field", "--label-field"} <= {*words}
    done = tritune(*words, "--base", base, *more)
    assert done.code == 0, done.stderr
