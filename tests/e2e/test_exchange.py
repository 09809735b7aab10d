"""`tritune export` and `tritune import` as a person uses them, PEFT itself on the other side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tritune as tt
from tests.e2e.conftest import REVIEWS, Data, Run
from tritune.adaptation import Adaptation, Origin
from tritune.methods import method_of
from tritune.models.load import load_base
from tritune.run import Training


@pytest.fixture
def adaptation(base: Path, reviews: Data, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stored LoRA as after some training."""
    import torch

    monkeypatch.setenv("TRITUNE_CACHE", str(cache))
    loaded = load_base(base, dtype="float32", device="cpu")
    task = tt.classification(test=str(reviews.test), text="body", label="topic", label_words={"negative": "bad"})
    config = tt.LoRA(rank=2)
    delta = method_of(config).init(config, loaded, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    Adaptation(loaded, task, config, delta.export(), Origin(Training(), 1e-3, 0, 5, {})).save(tmp_path / "mine")
    return tmp_path / "mine"


def test_out_and_in_again(tritune: Run, base: Path, adaptation: Path, reviews: Data, tmp_path: Path) -> None:
    out, back = tmp_path / "exported", tmp_path / "back"
    done = tritune("export", adaptation, "--base", base, "--format", "peft", "--out", out, "--test", reviews.test)
    assert done.code == 0, done.stderr
    assert "verified: largest difference of a logit" in done.stdout
    assert "by peft " in done.stdout

    # As from somebody else: no note of ours, so the task has to be said.
    (out / "tritune.json").unlink()
    bare = tritune("import", out, "--base", base, "--out", back)
    assert bare.code == 2
    assert "--labels" in bare.stderr
    options = ["--labels", ",".join(REVIEWS), "--label-words", "negative=bad", "--text-field", "body"]
    came = tritune("import", out, "--base", base, *options, "--label-field", "topic", "--out", back, "--json")
    assert came.code == 0, came.stderr
    told = json.loads(came.stdout)
    assert told["format"] == "peft"
    assert told["verified"]["largest_difference"] < told["verified"]["bound"] * told["verified"]["largest_logit"]
    texts = ["an awful bore", "a great joy"]
    wanted = tritune("predict", adaptation, "--base", base, *texts)
    assert tritune("predict", back, "--base", base, *texts).stdout == wanted.stdout
    assert "imported from peft" in tritune("show", back).stdout


def test_what_cannot_be(tritune: Run, base: Path, adaptation: Path, tmp_path: Path) -> None:
    unknown = tritune("export", adaptation, "--base", base, "--format", "pefft", "--out", tmp_path / "x")
    assert unknown.code == 2
    assert "Known: peft" in unknown.stderr
    nothing = tritune("import", adaptation, "--base", base, "--out", tmp_path / "x")
    assert nothing.code == 2
    assert "own form" in nothing.stderr
    half = tritune("import", adaptation, "--base", base, "--out", tmp_path / "x", "--template", "{{ text }}")
    assert half.code == 2
    assert "--labels" in half.stderr
    assert not (tmp_path / "x").exists()
