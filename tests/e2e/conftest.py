"""A tiny base as a Hugging Face folder, small data files, and the command line in this process or a fresh one."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.oracles import base_of

#: six labels in Russian, none the beginning of another by accident: "спорт" and "спортзал" are meant to be
WORDS = {
    "спорт": ["матч", "гол", "кубок"],
    "спортзал": ["гантели", "жим", "штанга"],
    "кино": ["фильм", "актёр", "кадр"],
    "еда": ["суп", "хлеб", "сыр"],
    "наука": ["атом", "опыт", "закон"],
    "погода": ["дождь", "снег", "ветер"],
}
POSITIONS = 4096
REVIEWS = {"negative": ["awful", "dull", "a bore"], "positive": ["great", "fine", "a joy"]}


@dataclass(frozen=True)
class Data:
    """Train and test files of one task."""

    train: Path
    test: Path

    @property
    def options(self) -> list[str]:
        return ["--train", str(self.train), "--test", str(self.test), "--text-field", "body", "--label-field", "topic"]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices: a second thread only waits. And the same arithmetic as in a fresh process with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base as `save_pretrained` writes it. Its rotary positions reach further than those of the other tests."""
    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tiny = base_of("llama")
    tiny.save_pretrained(folder, tiny.parameters())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    return folder


def rows(words: Mapping[str, Sequence[str]], n: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    labels = list(words)
    picked = [labels[i % len(labels)] for i in range(n)]
    return [{"body": f"{rng.choice(words[label])} {rng.randrange(10**6)}", "topic": label} for label in picked]


def write(path: Path, content: Sequence[Mapping[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        else:
            table = csv.DictWriter(file, list(content[0]))
            table.writeheader()
            table.writerows(content)
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Two labels, CSV."""
    folder = tmp_path_factory.mktemp("reviews")
    return Data(write(folder / "train.csv", rows(REVIEWS, 60, 1)), write(folder / "test.csv", rows(REVIEWS, 20, 2)))


@pytest.fixture(scope="session")
def topics(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Six labels, Russian, JSON lines."""
    folder = tmp_path_factory.mktemp("topics")
    return Data(write(folder / "train.jsonl", rows(WORDS, 72, 3)), write(folder / "test.jsonl", rows(WORDS, 24, 4)))


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def tritune(cache: Path) -> Run:
    """The command line in this process: `tritune("list", folder)`."""

    def run(*arguments: object, stdin: str | None = None, own_cache: bool = True) -> Done:
        from tritune.cli.app import app

        env = {"LC_ALL": "C.UTF-8", "COLUMNS": "100"} | ({"TRITUNE_CACHE": str(cache)} if own_cache else {})
        result = CliRunner(env=env).invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def environment(cache: Path) -> dict[str, str]:
    """For fresh processes."""
    return {**os.environ, "TRITUNE_CACHE": str(cache), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def start(environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """The command line in a fresh process, to be watched."""

    def run(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", "from tritune.cli import main; main()", *(str(a) for a in arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, encoding="utf-8")

    return run
