"""The command line on a quantised base: train, show, eval, export; and what a comparison refuses before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Data, Done, Run
from tritune.spec import Quantisation

SHORT = ["--epochs", "1", "--evaluations", "1", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tritune: Run, base: Path, reviews: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--base", base, "--quantise", "nf4", "--method", "lora", "--set", "rank=2", *reviews.options, *SHORT]
    done: Done = tritune("train", *options, "--out", out)
    assert done.code == 0, done.stderr
    assert "nf4, float32" in done.stderr
    return out


def test_the_run_and_the_adaptation_know_the_form(trained: Path, tritune: Run) -> None:
    shown = tritune("show", trained).stdout
    assert "weights in nf4" in shown
    assert "in memory" in shown
    metrics = json.loads((trained / "metrics.json").read_text())
    numbers = json.loads(tritune("show", trained, "--json").stdout)["manifest"]["base"]
    assert numbers["quantised"] == "nf4"
    assert 50_000 < metrics["base_bytes"] < 100_000, "169,888 without"
    assert "quantise: nf4" in (trained / "run.yaml").read_text()


def test_eval_takes_the_form_of_the_training_unless_told(trained: Path, tritune: Run, reviews: Data) -> None:
    score = json.loads((trained / "metrics.json").read_text())["test"]["score"]
    rows = ["--test", reviews.test, "--device", "cpu", "--json"]
    own = tritune("eval", trained, *rows)
    assert own.code == 0, own.stderr
    assert json.loads(own.stdout)["score"] == score
    assert "trained on a base" not in own.stderr
    other = tritune("eval", trained, *rows, "--quantise", "none")
    assert other.code == 0, other.stderr
    assert "trained on a base quantised to 'nf4', used on 'none'" in other.stderr


def test_export_says_which_weights_are_in_it(trained: Path, tritune: Run, tmp_path: Path) -> None:
    done = tritune("export", trained, "--format", "merged", "--device", "cpu", "--out", tmp_path / "merged")
    assert done.code == 0, done.stderr
    assert "the weights are those of the nf4 base it was trained on, dequantised" in " ".join(done.stdout.split())
    assert "largest difference of a logit" in done.stdout


@pytest.mark.parametrize("form", ["int8"])
def test_a_comparison_says_at_once_what_cannot_take_part(
    form: Quantisation, tritune: Run, base: Path, reviews: Data, tmp_path: Path
) -> None:
    done = tritune("compare", "--base", base, "--quantise", form, *reviews.options, *SHORT, "--out", tmp_path / "out")
    assert done.code == 2
    assert "full: moves weights that are int8 codes here, which learn nothing" in done.stderr
    assert "Those that do: --methods ptuning,prefix,bottleneck,ia3,lora" in done.stderr
    assert not (tmp_path / "out").exists()
    some = ["--methods", "ia3", "--shots", "0", "--rates", "1", "--json"]
    done = tritune(
        "compare", "--base", base, "--quantise", form, *reviews.options, *SHORT, *some, "--out", tmp_path / "out"
    )
    assert done.code == 0, done.stderr
    recorded = json.loads(done.stdout)["base"]
    assert (recorded["quantised"], recorded["bytes"]) == ("int8", 103_456)
    assert "weights in memory" in (tmp_path / "out" / "report.html").read_text()
