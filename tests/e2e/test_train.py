"""`tritune train` in its folder: begin, stop, be killed, go on; the result is the straight run's, bit for bit."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Data, Run
from tritune.cli.run_folder import RunFolder
from tritune.methods import METHODS
from tritune.methods.lora import LoRA
from tritune.recipes import documents

#: dropout draws random numbers in every step, so a resumed run must restore the generator too
METHOD = "lora"
SETTINGS = [
    "--method",
    METHOD,
    "--set",
    "rank=2",
    "--set",
    "dropout=0.2",
    "--evaluations",
    "3",
    "--batch-tokens",
    "256",
]
EPOCHS = ["--epochs", "12"]


@pytest.fixture(scope="module")
def options(base: Path, reviews: Data) -> list[str]:
    return ["--base", str(base), *reviews.options, *SETTINGS, *EPOCHS]


@pytest.fixture(scope="module")
def straight(tritune: Run, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "straight"
    done = tritune("train", *options, "--out", out, "--quiet")
    assert done.code == 0, done.stderr
    return out


def events(out: Path) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same_result(straight: Path, other: Path) -> None:
    for name in ("manifest.json", "adaptation.safetensors"):
        assert (other / "adaptation" / name).read_bytes() == (straight / "adaptation" / name).read_bytes(), name
    told = [{k: v for k, v in event.items() if k != "seconds"} for event in events(straight)]
    assert [{k: v for k, v in event.items() if k != "seconds"} for event in events(other)] == told
    same = ("best_step", "steps", "dev", "test", "id", "trainable_parameters")
    mine, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (straight, other))
    assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}


def test_a_run_folder(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    assert names == {"run.yaml", "events.jsonl", "metrics.json", "dev_score.svg", "train_loss.svg", "adaptation"}
    run = documents.parse((straight / "run.yaml").read_text(encoding="utf-8"), "run.yaml")
    assert run["config"] == LoRA(rank=2, dropout=0.2).model_dump(mode="json"), "every default is written out"
    assert run["config"]["alpha"] == 16.0
    assert isinstance(run["run"], dict)
    metrics = json.loads((straight / "metrics.json").read_text())
    assert metrics["test"]["n"] == 20
    assert [event["kind"] for event in events(straight)].count("evaluation") == 3
    assert events(straight)[-1]["kind"] == "done"
    assert (straight / "dev_score.svg").read_text().startswith("<svg xmlns")


def test_sigterm_stops_at_a_step_and_resume_goes_on(
    straight: Path, options: list[str], tritune: Run, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    out = tmp_path / "stopped run"
    process = start("train", *options, "--out", out)
    wait_for(process, lambda: len(events(out)) >= 5)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=240)
    assert (process.returncode, stdout) == (6, ""), stderr
    assert f"tritune train --resume --out '{out}'" in stderr
    assert not (out / "adaptation").exists()
    done = tritune("train", "--resume", "--out", out, "--quiet")
    assert done.code == 0, done.stderr
    assert_same_result(straight, out)


def test_kill_and_resume(
    straight: Path, options: list[str], tritune: Run, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = start("train", *options, "--out", out, "--quiet")
    # past the first saved state, so that some steps are lost and happen again
    wait_for(process, lambda: any(e["kind"] == "evaluation" for e in events(out)[:-3]))
    process.kill()
    process.communicate(timeout=240)
    torn = (out / "state" / ".new-torn") if (out / "state").is_dir() else None
    if torn:
        torn.mkdir()  # what a kill in the middle of saving leaves
    with (out / "events.jsonl").open("a") as file:
        file.write('{"kind": "ste')
    done = tritune("train", "--resume", "--out", out, "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["id"]
    assert_same_result(straight, out)
    assert not (out / "state").exists()


def test_only_the_same_run_is_resumed(
    straight: Path, options: list[str], tritune: Run, reviews: Data, tmp_path: Path
) -> None:
    out = tmp_path / "other"
    out.mkdir()
    (out / "run.yaml").write_bytes((straight / "run.yaml").read_bytes())
    shorter = tmp_path / "train.csv"
    shorter.write_text("".join(reviews.train.read_text(encoding="utf-8").splitlines(keepends=True)[:-2]))
    refused = tritune("train", "--resume", "--out", out, "--train", shorter, "--seed", "7", "-q")
    assert (refused.code, refused.stdout) == (2, "")
    assert "data.train" in refused.stderr
    assert "seed" in refused.stderr
    finished = tritune("train", "--resume", "--out", straight)
    assert finished.code == 0
    assert "nothing to resume" in finished.stderr
    assert tritune("train", "--resume", "--out", tmp_path / "nothing").code == 2


def test_an_earlier_run_is_replaced_only_when_asked(straight: Path, options: list[str], tritune: Run) -> None:
    before = (straight / "metrics.json").read_bytes()
    refused = tritune("train", *options, "--out", straight)
    assert refused.code == 2
    assert "--resume" in refused.stderr
    assert (straight / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("method", [kind for kind in METHODS if kind != METHOD])
def test_every_method_survives_its_state(
    method: str, base: Path, reviews: Data, tritune: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped in the middle by the wish that a signal would set, then resumed."""
    from contextlib import contextmanager

    from tritune.cli import training

    short = ["--base", base, *reviews.options, "--method", method, "--epochs", "2", "--evaluations", "2"]
    assert tritune("train", *short, "--out", tmp_path / "straight", "-q").code == 0
    asked: list[None] = []

    @contextmanager
    def wish() -> Any:
        yield lambda: asked.append(None) or len(asked) == 3

    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_wish", wish)
        assert tritune("train", *short, "--out", tmp_path / "stopped", "-q").code == 6
    state = RunFolder(tmp_path / "stopped").load()
    assert state is not None
    assert state.facts.step == 3
    assert tritune("train", "--resume", "--out", tmp_path / "stopped", "-q").code == 0
    files = [p for p in (tmp_path / "straight" / "adaptation").iterdir() if p.suffix in (".safetensors", ".json")]
    for path in files:
        assert (tmp_path / "stopped" / "adaptation" / path.name).read_bytes() == path.read_bytes()
