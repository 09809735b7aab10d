"""What needs no base is told before one is loaded: with a large one, that is minutes sooner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Data, Run
from tests.unit.store.adaptations import TENSOR, other
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.spec import MethodConfig
from tritune.store.registry import TENSORS, save_as

TASK = {"kind": "classification", "text_field": "body", "label_field": "topic", "labels": ["a", "b"]}
TASK |= {"label_words": {"a": "a", "b": "b"}, "template": {"context": "{{ body }}"}}


def keep(folder: Path, method: str, config: MethodConfig, **facts: Any) -> None:
    settings = config.model_dump(mode="json")
    save_as(folder, other(method=method, config=settings, **({"task": TASK} | facts)), tensors=TENSOR)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with adaptations of a base that is nowhere and must not be looked for."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded first")

    monkeypatch.setattr("tritune.models.load.locate", forbidden)
    monkeypatch.chdir(tmp_path)
    keep(tmp_path / "lora", "lora", LoRA(rank=2))
    keep(tmp_path / "renamed", "lora", LoRA(rank=2), task=TASK | {"labels": ["a", "c"]})
    keep(tmp_path / "prompt", "ptuning", PTuning(tokens=2))
    keep(tmp_path / "adapter", "bottleneck", Bottleneck())
    keep(tmp_path / "broken", "lora", LoRA(rank=2))
    (tmp_path / "broken" / TENSORS).unlink()
    keep(tmp_path / "future", "rola", LoRA(rank=2))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "rows.csv").write_text("body,topic\nfine,a\ndull,b\n")
    return tmp_path


CASES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "place of an export": ("export lora --format peft --out taken", ("taken is there already",)),
    "place below a file": ("export lora --format peft --out file/x", ("file is a file",)),
    "format": ("export lora --format pefft --out x", ("Known: peft",)),
    "no place in the format": ("export adapter --format peft --out x", ("no place for 'bottleneck'",)),
    "no place in another": ("export prompt --format adapters --out x", ("'ptuning' has no place",)),
    "no LoRA": ("export prompt --format gguf-lora --out x", ("'ptuning' is no LoRA",)),
    "no weights": ("export prompt --format merged --out x", ("input, not weight",)),
    "a Python that is not there": ("export lora --format peft --out x --reference no-such-python", ("no-such-python",)),
    "damaged, to export": ("export broken --format peft --out x", (f"{TENSORS}: missing",)),
    "damaged, to predict": ("predict broken text", (f"{TENSORS}: missing",)),
    "a method of tomorrow": ("predict future text", ("Unknown method", "'rola'")),
    "rows": ("eval lora --test nowhere.csv", ("nowhere.csv",)),
    "place of predictions": ("eval lora --test rows.csv --predictions taken", ("taken",)),
    "place of a stack": ("compose stack lora prompt --out taken", ("thesis.txt",)),
    "one prompt too many": ("compose stack prompt prompt --out x", ("2 parts have virtual tokens there",)),
    "whose task": ("compose stack lora --task-of 2 --out x", ("there are 1 adaptations",)),
    "tasks that differ": ("compose stack lora renamed --out x", ("part 2, task, labels", "--task-of 1")),
    "way and weights": (
        "compose merge lora lora --how tied --weights 1 --out x",
        ("--how: 'tied'; known", "--weights: 1 for 2 parts"),
    ),
    "place of a merge": ("compose merge lora lora --out taken", ("thesis.txt",)),
    "parts and density": (
        "compose merge prompt adapter broken --how ties --out x",
        ("part 1 (ptuning)", "part 2 (bottleneck)", "--density: ties needs it", f"{TENSORS}: missing"),
    ),
    "no adapters": ("compose fuse lora adapter --train rows.csv --out x", ("part 1 (lora): is no bottleneck",)),
    "place of a fusion": ("compose fuse adapter adapter --train rows.csv --out lora", ("earlier run",)),
    "no adapter": ("compose fuse --train rows.csv --out x", ("ADAPTATION...: not given",)),
    "place of an import": ("import nowhere --base b --out taken", ("thesis.txt",)),
    "nothing to import": ("import taken --base b --out x", ("No adaptation of a known format",)),
    "already ours": ("import lora --base b --out x", ("own form",)),
    "place of a run": ("train --train rows.csv --method lora --out file", ("is a file",)),
    "place of a comparison": ("compare --train rows.csv --test rows.csv --out file/x", ("is a file",)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_before_the_base_is_loaded(case: str, place: Path, tritune: Run) -> None:
    typed, said = CASES[case]
    before = sorted(place.rglob("*"))
    done = tritune(*typed.split())
    assert done.code != 0
    assert done.stdout == ""
    assert [part for part in said if part not in done.stderr] == [], done.stderr
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", ["compare", "train"])
def test_so_are_settings_and_rows(command: str, place: Path, tritune: Run, reviews: Data) -> None:
    options = [*reviews.options, "--out", "x"] + (["--method", "full"] if command == "train" else [])
    coded = tritune(command, *options, "--quantise", "int8")
    assert coded.code == 2
    assert "full: moves weights that are int8 codes" in coded.stderr
    fields = ["--text-field", "body", "--label-field", "topic"]
    rows = ["--train", "rows.csv", "--test", reviews.test, "--allow-duplicates", *fields, "--out", "x"]
    if command == "compare":
        twice = tritune("compare", *options, "--seeds", "1,1")
        assert "seed 1: given twice" in twice.stderr
    (place / "rows.csv").write_text("body,topic\nfine,positive\ndull,negative\n")
    few = tritune(command, *rows, *(["--method", "lora"] if command == "train" else []))
    assert few.code == 2, few
    assert "dev" in few.stderr


@pytest.mark.parametrize(
    ("method", "made_by"), [("stack", "compose stack A B"), ("fusion", "compose fuse A B --train")]
)
def test_a_method_made_of_others_says_which_command_makes_one(
    method: str, made_by: str, place: Path, tritune: Run, reviews: Data
) -> None:
    alone = tritune("train", *reviews.options, "--method", method, "--out", "x")
    beside = tritune("compare", *reviews.options, "--methods", f"lora,{method}", "--out", "x")
    for done in (alone, beside):
        assert (done.code, done.stdout) == (2, "")
        assert f"{method}: " in done.stderr
        assert f"tritune {made_by}" in done.stderr
    assert not (place / "x").exists()


def test_a_fusion_is_not_trained_from_a_recipe_either(place: Path, tritune: Run, reviews: Data) -> None:
    parts = "[{method: bottleneck, config: {}}, {method: bottleneck, config: {}}]"
    (place / "mine.yaml").write_text(f"method: fusion\nconfig: {{parts: {parts}}}\n")
    done = tritune("train", *reviews.options, "--config", "mine.yaml", "--out", "x")
    assert "tritune compose fuse" in done.stderr
