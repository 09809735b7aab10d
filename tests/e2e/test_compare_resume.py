"""`tritune compare`, stopped: it says how to go on, and going on gives the comparison that nobody stopped."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Data, Run

PLAN = ["--methods", "lora,ptuning", "--seeds", "0,1", "--epochs", "3", "--rates", "1", "--shots", "0", "--dtype"]
PLAN += ["float32", "--label-words", "negative=bad,positive=good", "--template", "{{ body }}\nIs:"]


def entries(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "entries").glob("*.json"))


def scores(stdout: str) -> list[tuple[Any, ...]]:
    names = ("method", "seed", "score", "low", "high", "best_step", "learning_rate", "trainable_parameters")
    return [tuple(entry[name] for name in names) for entry in json.loads(stdout)["entries"]]


def test_ctrl_c_says_how_to_go_on_and_so_it_goes_on(
    tritune: Run, start: Callable[..., subprocess.Popen[str]], base: Path, reviews: Data, tmp_path: Path
) -> None:
    options = ["--base", base, *reviews.options, *PLAN]
    out = tmp_path / "a run"
    process = start("compare", *options, "--out", out, "--overwrite")
    deadline = time.monotonic() + 240
    while "lora-0" not in entries(out):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=240)
    assert (process.returncode, stdout) == (6, ""), stderr
    told = stderr[stderr.index("Go on with:") :].splitlines()[1]
    assert not (out / "comparison.json").exists()

    refused = tritune("compare", *options, "--epochs", "5", "--set", "lora.rank=3", "--out", out)
    assert refused.code == 2
    for part in ("plan.training.epochs: was 3.0, is 5.0", "configs.lora.rank: was 8, is 3", "--overwrite"):
        assert part in refused.stderr
    before = entries(out)
    done = tritune(*shlex.split(told)[1:], "--json")
    assert done.code == 0, done.stderr
    assert "taken over" in done.stderr
    assert before != entries(out) == ["lora-0", "lora-1", "ptuning-0", "ptuning-1", "zero-shot-0"]
    straight = tritune("compare", *options, "--out", tmp_path / "straight", "--json", "--quiet")
    assert scores(done.stdout) == scores(straight.stdout)
    assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "straight").iterdir()}


def test_a_finished_comparison_says_so_and_shows_its_result(
    tritune: Run, base: Path, reviews: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    plan = ["--methods", "lora", "--epochs", "1", "--rates", "1", "--shots", "0"]
    options = ["--base", base, *reviews.options, *plan, "--out", out]
    first = tritune("compare", *options, "--json")
    assert first.code == 0, first.stderr
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("nothing is measured again, and no base is loaded")

    with monkeypatch.context() as patch:
        patch.setattr("tritune.models.load.locate", forbidden)
        again = tritune("compare", *options, "--json")
        assert (again.code, again.stdout) == (0, first.stdout)
        assert "is finished" in again.stderr
        assert str(out / "report.html") in again.stderr
        recipe = tritune("compare", "--config", out / "run.yaml", "--out", out)
        assert recipe.code == 0, recipe.stderr
        assert str(out / "report.html") in recipe.stdout

        other = tritune("compare", *options, "--epochs", "2", "--set", "lora.rank=3")
        assert (other.code, other.stdout) == (2, "")
        for part in ("another comparison", "epochs: was 1.0, is 2.0", "configs.lora.rank: was 8, is 3", "--overwrite"):
            assert part in other.stderr
        shorter = tmp_path / "train.csv"
        shorter.write_text("".join(reviews.train.read_text(encoding="utf-8").splitlines(keepends=True)[:-2]))
        rows = tritune("compare", *options, "--train", shorter)
        assert rows.code == 2
        assert "data.train: was" in rows.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept


@pytest.mark.parametrize("command", ["compare", "demo"])
def test_stopped_before_anything_was_measured_nothing_is_left(
    tritune: Run, base: Path, reviews: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    recipe = {"base": str(base), "train": str(reviews.train), "test": str(reviews.test), "seeds": [0]}
    recipe |= {"text_field": "body", "label_field": "topic"}
    monkeypatch.setattr("tritune.recipes.read", lambda _: recipe)
    monkeypatch.setattr("tritune.comparison._measure_prompting", stopped)
    more = ["--config", "mine"] if command == "compare" else []
    done = tritune(command, *more, "--out", tmp_path / "run")
    assert (done.code, done.stdout) == (6, "")
    assert "before anything was measured" in done.stderr
    assert not (tmp_path / "run").exists()
