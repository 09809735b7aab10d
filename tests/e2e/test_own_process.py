"""Commands in processes of their own, where imports wait, against the same commands in one where none does."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Data, Run

Start = Callable[..., subprocess.Popen[str]]


def done(start: Start, *arguments: object) -> str:
    process = start(*arguments)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout


def trained(start: Start, base: Path, reviews: Data, out: Path, *options: object) -> Path:
    given = ["--base", base, *reviews.options, "--dtype", "float32", "--epochs", "1", "--learning-rate", "0.01"]
    done(start, "train", *given, *options, "--out", out, "-q")
    return out


@pytest.fixture(scope="module")
def lora(start: Start, base: Path, reviews: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(start, base, reviews, tmp_path_factory.mktemp("own") / "run", "--method", "lora")


def assert_answers_are_those_of_here(start: Start, tritune: Run, run: Path, reviews: Data) -> None:
    asked = ["predict", run, "--file", reviews.test, "--json", "-q"]
    here = tritune(*asked)
    assert here.code == 0, here.stderr
    assert here.stdout.strip()
    assert done(start, *asked) == here.stdout


def test_a_lora_answers_and_is_scored(start: Start, tritune: Run, lora: Path, reviews: Data) -> None:
    assert_answers_are_those_of_here(start, tritune, lora, reviews)
    done(start, "eval", lora, "--test", reviews.test, "-q")


@pytest.mark.parametrize(
    "options", ["--method full", "--method lora --quantise int8", "--method lora --compile"], ids=str
)
def test_other_ways_to_train(
    start: Start, tritune: Run, base: Path, reviews: Data, tmp_path: Path, options: str
) -> None:
    """What is built, quantised, or compiled in earnest, of a model that was imported with stand-ins."""
    run = trained(start, base, reviews, tmp_path / "run", *options.split())
    assert_answers_are_those_of_here(start, tritune, run, reviews)


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_exports(start: Start, lora: Path, tmp_path: Path, form: str) -> None:
    """The other package answers in the same process, with all that it imports."""
    assert "verified" in done(start, "export", lora / "adaptation", "--format", form, "--out", tmp_path / "out")
