"""`tritune compose`: stored adaptations in, one stored adaptation out, that every other command takes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Data, Run
from tritune.cli import training
from tritune.store import registry

pytestmark = pytest.mark.xdist_group("compose")


@pytest.fixture(scope="module")
def trained(base: Path, reviews: Data, tritune: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("parts")
    runs = {
        "prompt": ["--method", "ptuning", "--set", "tokens=3"],
        "lora": ["--method", "lora", "--set", "rank=2"],
        "lora2": ["--method", "lora", "--set", "rank=3", "--seed", "1"],
        "adapter": ["--method", "bottleneck"],
        "adapter2": ["--method", "bottleneck", "--seed", "1"],
    }
    for name, options in runs.items():
        options = [*options, "--learning-rate", "1e-2", "--epochs", "1", "--evaluations", "1", "-q"]
        done = tritune("train", "--base", base, *reviews.options, *options, "--out", root / name)
        assert done.code == 0, done.stderr
    return {name: root / name for name in runs}


def test_a_prompt_and_a_lora_stacked_are_used_like_any_other(
    trained: dict[str, Path], base: Path, reviews: Data, tritune: Run, tmp_path: Path
) -> None:
    out = tmp_path / "both"
    done = tritune("compose", "stack", trained["prompt"], trained["lora"], "--out", out, "--json")
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["method"], [part["method"] for part in told["made"]["parts"]]) == ("stack", ["ptuning", "lora"])
    assert told["id"] == registry.read(out).id
    assert tritune("predict", out, "great", "--base", base).code == 0
    evaluated = tritune(
        "eval", out, "--test", reviews.test, "--text-field", "body", "--label-field", "topic", "--base", base
    )
    assert evaluated.code == 0, evaluated.stderr
    shown = tritune("show", out)
    assert "made" in shown.stdout
    assert "ptuning" in shown.stdout
    assert told["id"][:12] in tritune("list", tmp_path).stdout


def test_loras_merge_and_say_what_their_rank_cost(trained: dict[str, Path], tritune: Run, tmp_path: Path) -> None:
    pair = [trained["lora"], trained["lora2"]]
    exact = tritune("compose", "merge", *pair, "--weights", "1,0.5", "--out", tmp_path / "exact")
    assert exact.code == 0, exact.stderr
    assert "exact" in exact.stdout
    cut = tritune("compose", "merge", *pair, "--how", "ties", "--density", "0.3", "--out", tmp_path / "cut")
    assert "off by" in cut.stdout
    assert {registry.read(tmp_path / name).manifest.method for name in ("exact", "cut")} == {"lora"}


def test_adapters_fuse_on_rows(trained: dict[str, Path], reviews: Data, tritune: Run, tmp_path: Path) -> None:
    options = [*reviews.options, "--epochs", "1", "--evaluations", "1", "--learning-rate", "1e-3"]
    done = tritune("compose", "fuse", trained["adapter"], trained["adapter2"], *options, "--out", tmp_path / "fused")
    assert done.code == 0, done.stderr
    assert registry.read(tmp_path / "fused" / "adaptation").manifest.steps > 0
    assert "test: accuracy" in done.stdout
    assert tritune("predict", tmp_path / "fused", "great").code == 0


def test_a_fusion_that_was_stopped_goes_on(
    trained: dict[str, Path], reviews: Data, tritune: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle by the wish that a signal would set; the result is that of a run that nobody stopped."""
    parts = [trained["adapter"], trained["adapter2"]]
    options = [*reviews.options, "--epochs", "2", "--evaluations", "2", "--seed", "3", "-q"]
    assert tritune("compose", "fuse", *parts, *options, "--out", tmp_path / "straight").code == 0
    asked: list[None] = []

    @contextmanager
    def wish() -> Iterator[Callable[[], bool]]:
        yield lambda: asked.append(None) or len(asked) == 3

    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_wish", wish)
        stopped = tritune("compose", "fuse", *parts, *options, "--out", tmp_path / "stopped")
    assert (stopped.code, stopped.stdout) == (6, "")
    again = shlex.split(stopped.stderr.splitlines()[-1])
    assert again == ["tritune", "compose", "fuse", "--resume", "--out", str(tmp_path / "stopped")]
    other = tritune(*again[1:4], trained["adapter2"], trained["adapter"], "--seed", "4", *again[4:])
    assert other.code == 2
    for part in ("made.parts", "seed: was 3, is 4"):
        assert part in other.stderr
    assert "--resume" in tritune("compose", "fuse", *parts, *options, "--out", tmp_path / "stopped").stderr
    done = tritune(*again[1:], "--json")
    assert done.code == 0, done.stderr
    assert "going on after step 3" in done.stderr
    assert json.loads(done.stdout)["method"] == "fusion"
    for name in ("manifest.json", "adaptation.safetensors"):
        straight, found = (tmp_path / run / "adaptation" / name for run in ("straight", "stopped"))
        assert straight.read_bytes() == found.read_bytes()
    assert "nothing to resume" in tritune(*again[1:]).stderr


def test_every_reason_is_told_and_nothing_is_written(trained: dict[str, Path], tritune: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tritune("compose", "merge", trained["prompt"], trained["adapter"], "--how", "ties", "--out", out)
    assert done.code == 2
    assert all(said in done.stderr for said in ("part 1 (ptuning)", "part 2 (bottleneck)", "density"))
    assert tritune("compose", "stack", trained["prompt"], trained["prompt"], "--out", out).code == 2
    assert tritune("compose", "stack", trained["lora"], "--task-of", "2", "--out", out).code == 2
    assert not out.exists()


def test_a_stack_is_trained_from_a_recipe(base: Path, reviews: Data, tritune: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    parts = "[{method: ptuning, config: {tokens: 2}}, {method: lora, config: {rank: 2}}]"
    recipe.write_text(f"method: stack\nconfig: {{parts: {parts}}}\n")
    options = ["--base", base, *reviews.options, "--epochs", "1", "--evaluations", "1", "-q"]
    done = tritune("train", "--config", recipe, *options, "--out", tmp_path / "run")
    assert done.code == 0, done.stderr
