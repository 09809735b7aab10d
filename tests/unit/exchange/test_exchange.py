"""Out and in as a whole: verified by the reference in a process of its own, published or gone; bases and tasks told apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracles import base_of
from tests.unit.exchange.conftest import adapted, assert_same_tensors, problems, task
from tritune.adaptation import Adaptation
from tritune.errors import Mismatch
from tritune.exchange import FORMATS, format_named, inward, outward, recognise
from tritune.exchange.format import Absent
from tritune.exchange.inward import import_folder
from tritune.exchange.outward import export
from tritune.exchange.peft import CONFIG, TENSORS, Peft
from tritune.exchange.sidecar import SIDECAR
from tritune.exchange.verify import Verdict, compare, sample_rows
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.spec import MethodConfig

ROWS = [[5, 9, 31, 7], [8, 3]]


@pytest.fixture(scope="module")
def lora() -> Adaptation:
    return adapted(base_of("llama-tied"), LoRA(rank=3))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own importer in place of the reference library, as where that is not installed."""

    def absent(*_: object) -> Verdict:
        raise Absent("not installed")

    monkeypatch.setattr(outward, "verify", absent)
    monkeypatch.setattr(inward, "verified", absent)


# --- with PEFT itself, in a process of its own ---


@pytest.mark.parametrize(
    ("name", "config"),
    [("gpt-neox", LoRA(rank=2)), ("llama-tied", PTuning(tokens=3, hidden=6))],
    ids=["lora", "prompt"],
)
def test_there_and_back_with_the_reference(name: str, config: MethodConfig, tmp_path: Path) -> None:
    mine = adapted(base_of(name), config)
    done = export(mine, "peft", tmp_path / "out")
    assert done.verdict.by.startswith("peft ")
    assert done.verdict.difference < 1e-4 < 0.1 < done.verdict.effect
    assert {p.name for p in (tmp_path / "out").iterdir()} == {CONFIG, TENSORS, SIDECAR}
    back = import_folder(tmp_path / "out", mine.base)
    assert back.verdict is not None
    assert back.verdict.holds
    assert_same_tensors(back.adaptation.delta.export(), mine.delta.export())
    assert back.adaptation.task.spec == mine.task.spec, "the task came along"


def test_what_answers_otherwise_leaves_nothing_behind(
    lora: Adaptation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference notices one number of one tensor."""
    write = Peft.write

    def wrong(self: Peft, adaptation: Adaptation, folder: Path) -> None:
        write(self, adaptation, folder)
        tensors = load_file(folder / TENSORS)
        tensors[min(tensors)][0, 0] += 1.0
        save_file(tensors, folder / TENSORS)

    monkeypatch.setattr(Peft, "write", wrong)
    with pytest.raises(Mismatch, match="thrown away"):
        export(lora, "peft", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_fails_is_quoted(lora: Adaptation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Peft.write

    def surplus(self: Peft, adaptation: Adaptation, folder: Path) -> None:
        write(self, adaptation, folder)
        save_file({**load_file(folder / TENSORS), "more": torch.zeros(1)}, folder / TENSORS)

    monkeypatch.setattr(Peft, "write", surplus)
    with pytest.raises(Mismatch, match="other tensors than are stored"):
        export(lora, "peft", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- without it ---


def test_without_the_reference_our_importer_answers(lora: Adaptation, tmp_path: Path, quick: None) -> None:
    done = export(lora, "peft", tmp_path / "out", rows=ROWS)
    assert "own importer" in done.verdict.by
    assert (done.verdict.rows, done.verdict.tokens) == (2, 6)
    assert import_folder(tmp_path / "out", lora.base).verdict is None


def test_an_interpreter_that_lacks_the_reference_is_an_error(lora: Adaptation, tmp_path: Path) -> None:
    """Who names one wants that one to answer."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # no site-packages
    bare.chmod(0o755)
    with pytest.raises(Absent, match="peft is not installed"):
        export(lora, "peft", tmp_path / "out", python=str(bare))
    with pytest.raises(Absent, match="cannot be started"):
        export(lora, "peft", tmp_path / "out", python=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken(lora: Adaptation, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Mismatch, match="there already"):
        export(lora, "peft", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


# --- which base, which task ---


def test_another_base_is_told_by_content(lora: Adaptation, tmp_path: Path, quick: None) -> None:
    """The same family and shapes: only the weights are others. And its tensors are bad too: one error."""
    export(lora, "peft", tmp_path / "out")
    with pytest.raises(Mismatch) as caught:
        import_folder(tmp_path / "out", tiny_base("llama-tied", seed=1))
    assert set(problems(caught.value)) == {"weights of the base", "config of the base"}
    with pytest.raises(Mismatch) as caught:
        import_folder(tmp_path / "out", base_of("gpt2"))
    assert {"weights of the base", "config key 'target_modules'"} < set(problems(caught.value))


def test_another_base_is_told_by_name(lora: Adaptation, tmp_path: Path, quick: None) -> None:
    export(lora, "peft", tmp_path / "out")
    (tmp_path / "out" / SIDECAR).unlink()
    other = Base(lora.base.model, lora.base.tokenizer, "other/base", lora.base.digests)
    with pytest.raises(Mismatch) as caught:
        import_folder(tmp_path / "out", other, task())
    assert set(problems(caught.value)) == {"name of the base"}
    assert import_folder(tmp_path / "out", other, task(), same_base=True).adaptation.base is other
    same = Base(lora.base.model, lora.base.tokenizer, "somebody/Tiny-Llama-Tied", lora.base.digests)
    assert import_folder(tmp_path / "out", same, task()).adaptation.base is same


def test_without_a_task_it_is_of_no_use(lora: Adaptation, tmp_path: Path, quick: None) -> None:
    export(lora, "peft", tmp_path / "out")
    (tmp_path / "out" / SIDECAR).unlink()
    with pytest.raises(Mismatch, match="--labels"):
        import_folder(tmp_path / "out", lora.base)


def test_an_imported_adaptation_is_one_like_any_other(lora: Adaptation, tmp_path: Path, quick: None) -> None:
    from tritune.adaptation import load

    export(lora, "peft", tmp_path / "out")
    back = import_folder(tmp_path / "out", lora.base).adaptation
    stored = back.save(tmp_path / "stored")
    assert [name for name in stored.manifest.data if "peft" in name]
    again = load(tmp_path / "stored", base=lora.base)
    texts = ["good one", "bad one"]
    assert again.predict(texts) == lora.predict(texts)


def test_files_changed_since_are_told(lora: Adaptation, tmp_path: Path, quick: None) -> None:
    export(lora, "peft", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / TENSORS)
    save_file({name: 2 * t for name, t in tensors.items()}, tmp_path / "out" / TENSORS)
    with pytest.raises(Mismatch) as caught:
        import_folder(tmp_path / "out", lora.base)
    assert problems(caught.value) == {TENSORS: "was changed"}


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["manifest.json"], "own form"),
        (["config.json"], "--base"),
        (["notes.txt"], "PEFT and adapter-hub"),
        ([], "PEFT"),
    ],
)
def test_what_is_no_adaptation_of_others(names: list[str], hint: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(Mismatch, match=hint):
        recognise(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '"peft_type"'])
def test_any_adapter_config_is_told_apart(content: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(content)
    with pytest.raises(Mismatch):
        recognise(tmp_path)


# --- verdicts ---


def logits(*values: float) -> list[Tensor]:
    return [torch.tensor([[value, 10.0]]) for value in values]


@pytest.mark.parametrize(
    ("theirs", "bare", "holds"),
    [
        (logits(1.0, 2.0), logits(0.0, 0.0), True),
        (logits(1.0, 2.0005), logits(0.0, 0.0), True),
        (logits(1.0, 2.01), logits(0.0, 0.0), False),
        (logits(1.0, float("nan")), logits(0.0, 0.0), False),
        ([torch.zeros(1, 3), torch.zeros(1, 2)], logits(0.0, 0.0), False),
        (logits(1.0, 2.0), logits(1.0, 2.0), True),
    ],
    ids=["equal", "rounding", "different", "no number", "other shape", "an adaptation that does nothing"],
)
def test_a_verdict(theirs: list[Tensor], bare: list[Tensor], holds: bool) -> None:
    verdict = compare(logits(1.0, 2.0), theirs, bare, "x", 1e-4)
    assert verdict.holds is holds
    assert ("hardly moves" in str(verdict)) == (bare[0][0, 0] == 1.0)


def test_the_bare_base_is_never_taken_for_the_adaptation() -> None:
    """Within the loose bound of merged bf16 weights, but what was asked for was not applied."""
    live, bare = [torch.tensor([[10.0, 0.6]])], [torch.tensor([[10.0, 0.0]])]
    assert compare(live, live, bare, "x", 5e-2).holds
    assert not compare(live, bare, bare, "x", 5e-2).holds


def test_the_sample_leaves_room_for_virtual_tokens() -> None:
    base = base_of("llama-tied")
    assert max(map(len, sample_rows(base))) > 60
    assert max(map(len, sample_rows(base, base.max_positions - 60))) == 60


def test_the_table_resolves() -> None:
    for name in FORMATS:
        assert format_named(name).name == name
    with pytest.raises(Mismatch, match="Known: peft"):
        format_named("peftt")
