"""`tritune compare` from files to report on a tiny base, and what can be done with the result afterwards."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Data, Done, Run
from tritune.methods import METHODS
from tritune.spec import Strategy

KEYS = {
    "method", "strategy", "seed", "metric", "score", "low", "high", "n", "trainable_parameters", "stored_bytes",
    "train_seconds", "train_tokens_per_second", "train_peak_bytes", "eval_peak_bytes", "adaptation",
}  # fmt: skip

#: quick, and every method still trains
QUICK = ["--epochs", "1", "--rates", "1,3", "--shots", "2", "--evaluations", "1", "--batch-tokens", "1024"]


@pytest.fixture(scope="module")
def done(tritune: Run, base: Path, topics: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """Six labels in Russian, every method, as JSON."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "topics"
    options = ["--base", base, *topics.options, "--template", "Тема: {{ body }}\nОтвет:", *QUICK, "--out", out]
    return tritune("compare", *options, "--methods", "all", "--json"), out


@pytest.fixture(scope="module")
def record(done: tuple[Done, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done[0].stdout)
    return found


def trained(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in record["entries"] if entry["adaptation"]]


def test_standard_output_is_the_record_and_nothing_else(done: tuple[Done, Path], record: dict[str, Any]) -> None:
    result, out = done
    assert result.code == 0, result.stderr
    assert result.stdout == (out / "comparison.json").read_text(encoding="utf-8")
    assert {"entries", "pairs", "caveats"} <= record.keys()
    assert all(entry.keys() >= KEYS for entry in record["entries"])
    assert "test" in result.stderr, "progress is told on standard error"


def test_every_method_and_the_baselines_are_measured(record: dict[str, Any]) -> None:
    assert [entry["method"] for entry in record["entries"]] == ["zero-shot", "few-shot", *METHODS]
    assert {entry["strategy"] for entry in record["entries"]} == set(Strategy)
    assert all(entry["n"] == 24 for entry in record["entries"])
    assert len(record["pairs"]) == math.comb(2 + len(METHODS), 2)
    for entry in record["entries"]:
        assert (entry["forgetting"] is None) == (entry["strategy"] == Strategy.PROMPTING)
    assert record["task"]["labels"].keys() == {"спорт", "спортзал", "кино", "еда", "наука", "погода"}
    assert record["command"].startswith("tritune compare --base")


def test_files_of_a_comparison(done: tuple[Done, Path]) -> None:
    out = done[1]
    names = {path.name for path in out.iterdir()}
    expected = {"comparison.json", "comparison.md", "report.html", "run.yaml", "plan.json"}
    expected |= {"adaptations", "entries", "examples"}
    assert names == expected
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")
    assert len(list((out / "adaptations").iterdir())) == len(METHODS)


def test_the_plan_repeats_the_comparison(done: tuple[Done, Path], tritune: Run, tmp_path: Path) -> None:
    """run.yaml is a recipe: the same settings, here cut down to one method."""
    kind = next(iter(METHODS))
    again = tritune(
        "compare", "--config", done[1] / "run.yaml", "--methods", kind, "--out", tmp_path / "again", "--json"
    )
    assert again.code == 0, again.stderr
    first, second = (
        next(e for e in json.loads(result.stdout)["entries"] if e["method"] == kind) for result in (done[0], again)
    )
    assert Path(first["adaptation"]).name == Path(second["adaptation"]).name, "the same content has the same name"
    assert first["score"] == second["score"]


def test_nothing_is_replaced_by_accident(done: tuple[Done, Path], tritune: Run, base: Path, topics: Data) -> None:
    out = done[1]
    before = (out / "comparison.json").read_bytes()
    again = tritune("compare", "--base", base, *topics.options, *QUICK, "--out", out)
    assert (again.code, again.stdout) == (2, "")
    assert "--overwrite" in again.stderr
    (out / "mine.txt").write_text("precious")
    again = tritune("compare", "--base", base, *topics.options, *QUICK, "--out", out, "--overwrite")
    assert again.code == 2
    assert "mine.txt" in again.stderr
    (out / "mine.txt").unlink()
    assert (out / "comparison.json").read_bytes() == before


EVALUATE = """
import json, sys
from typer.testing import CliRunner
from tritune.cli.app import app
adaptations, options, out = json.loads(sys.argv[1])
for i, adaptation in enumerate(adaptations):
    result = CliRunner().invoke(
        app, ["eval", adaptation, *options, "--json", "-q", "--predictions", f"{out}/{i}.jsonl"], catch_exceptions=False
    )
    print(json.dumps(json.loads(result.stdout)))
answer = CliRunner().invoke(app, ["predict", adaptations[-1], "--file", options[1], "--json", "-q"], catch_exceptions=False)
print(json.dumps(json.loads(answer.stdout)))
"""


def test_a_fresh_process_reproduces_scores_and_answers(
    done: tuple[Done, Path], record: dict[str, Any], topics: Data, environment: dict[str, str], tmp_path: Path
) -> None:
    entries = trained(record)
    options = ["--test", str(topics.test), "--text-field", "body", "--label-field", "topic"]
    given = json.dumps([[entry["adaptation"] for entry in entries], options, str(tmp_path)])
    fresh = subprocess.run(
        [sys.executable, "-c", EVALUATE, given], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    *evaluations, answers = (json.loads(line) for line in fresh.stdout.splitlines())
    for i, (entry, found) in enumerate(zip(entries, evaluations, strict=True)):
        assert {key: found[key] for key in ("score", "low", "high", "n", "metric", "method")} == {
            key: entry[key] for key in ("score", "low", "high", "n", "metric", "method")
        }
        stored = done[1] / "examples" / f"{entry['method']}-{entry['seed']}.jsonl"
        assert (tmp_path / f"{i}.jsonl").read_text(encoding="utf-8") == stored.read_text(encoding="utf-8")
    judged = [json.loads(line) for line in stored.read_text(encoding="utf-8").splitlines()]
    assert [answer["label"] for answer in answers] == [row["predicted"] for row in judged]


def test_predict_texts_and_standard_input(record: dict[str, Any], tritune: Run) -> None:
    adaptation = trained(record)[-1]["adaptation"]
    texts = ["матч [bold]1[/bold]", "сыр 2"]
    given = tritune("predict", adaptation, *texts)
    piped = tritune("predict", adaptation, stdin="\n".join(texts) + "\n")
    assert given.code == piped.code == 0, given.stderr
    assert given.stdout == piped.stdout
    fields = [line.split("\t") for line in given.stdout.splitlines()]
    assert [line[2] for line in fields] == texts
    nothing = tritune("predict", adaptation, stdin="")
    assert (nothing.code, nothing.stdout) == (2, "")


def test_a_full_fine_tune_needs_no_tritune(record: dict[str, Any], base: Path) -> None:
    """transformers alone loads the folder, with equal logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tritune.adaptation import load
    from tritune.models.base import Batch, Span
    from tritune.models.load import load_base

    entry = next(entry for entry in trained(record) if entry["strategy"] == Strategy.FULL)
    adaptation = load(entry["adaptation"], base=load_base(base, dtype="float32"))  # some machines prefer bf16
    model = AutoModelForCausalLM.from_pretrained(entry["adaptation"], dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(entry["adaptation"])("Тема: матч")["input_ids"]
    tokens_N = torch.tensor(ids)
    with torch.no_grad(), adaptation.base.bind(adaptation.delta):
        ours = adaptation.base.logits(Batch(tokens_N, (Span(0, len(ids)),)), torch.arange(len(ids)))
        torch.testing.assert_close(ours, model(tokens_N[None]).logits[0], rtol=1e-4, atol=1e-4)
    changed = sum(
        not torch.equal(tensor, adaptation.base.parameters()[name])
        for name, tensor in adaptation.delta.export().items()
    )
    assert changed > 20


def test_list_and_show(done: tuple[Done, Path], record: dict[str, Any], tritune: Run) -> None:
    listed = json.loads(tritune("list", done[1], "--json").stdout)
    scores = {Path(entry["adaptation"]).name: entry["score"] for entry in trained(record)}
    assert {Path(each["folder"]).name: each["score"]["score"] for each in listed} == scores
    table = tritune("list", done[1]).stdout
    assert all(each["id"][:12] in table for each in listed)

    one = trained(record)[-1]["adaptation"]
    shown = tritune("show", one).stdout
    assert "intact" in shown
    assert "спорт" in shown
    assert any(line.endswith(f"  {one}") for line in shown.splitlines()), "a path in one piece"
    whole = json.loads(tritune("show", one, "--json").stdout)
    assert whole["manifest"]["method"] == trained(record)[-1]["method"]


def test_an_adaptation_elsewhere_needs_its_base_named(
    record: dict[str, Any], tritune: Run, base: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained(record)[-1]["adaptation"], copy)
    lost = tritune("predict", copy, "матч")
    assert lost.code == 3
    assert "--base" in lost.stderr
    assert tritune("predict", copy, "матч", "--base", base).code == 0


def test_a_changed_file_is_told_and_refused(record: dict[str, Any], tritune: Run, base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained(record)[-1]["adaptation"], copy)
    tensors = copy / "adaptation.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert "CHANGED" in tritune("show", copy).stdout
    refused = tritune("predict", copy, "матч", "--base", base)
    assert (refused.code, refused.stdout) == (2, "")
    assert "adaptation.safetensors" in refused.stderr


def test_explain_with_the_figures_of_a_run(done: tuple[Done, Path], tritune: Run) -> None:
    plain = tritune("explain", "adapters", "--lang", "ru")
    told = tritune("explain", "adapters", "--lang", "ru", "--run", done[1])
    assert plain.code == told.code == 0
    assert len(told.stdout) > len(plain.stdout)
    assert "адаптер" in told.stdout.lower()
    assert tritune("explain", "prompting").code == 2
