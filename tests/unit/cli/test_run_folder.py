"""States on disk: the newest whole one counts, whatever a kill left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tritune.cli.run_folder import RunFolder
from tritune.errors import Mismatch, StorageError
from tritune.evaluate.record import CurvePoint
from tritune.train.state import Best, Facts, TrainState


def state(step: int) -> TrainState:
    point = CurvePoint(step=step, rows=8, tokens=100, seconds=0.1 + 0.2, train_loss=1 / 3)
    facts = Facts(
        step=step, rows=8, tokens=100, seconds=0.1 + 0.2, best=Best(step=1, score=0.5, loss=1 / 7), curve=(point,)
    )
    tensors = {"delta/a.b/c": torch.randn(2, 3), "optimizer/x/step": torch.tensor(3.0), "rng": torch.get_rng_state()}
    return TrainState(facts, tensors)


def test_a_state_comes_back_exactly(tmp_path: Path) -> None:
    folder, saved = RunFolder(tmp_path / "run"), state(5)
    assert folder.load() is None
    folder.save(saved)
    found = folder.load()
    assert found is not None
    assert found.facts == saved.facts
    assert found.tensors.keys() == saved.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in saved.tensors.items())


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (9, 10, 100):
        folder.save(state(step))
    assert len(list((tmp_path / "state").iterdir())) == 1
    found = folder.load()
    assert found is not None
    assert found.facts.step == 100
    folder.drop_state()
    assert folder.load() is None


def test_what_a_kill_leaves_is_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(state(3))
    (tmp_path / "state" / ".new-torn").mkdir()
    (tmp_path / "state" / ".new-torn" / "state.safetensors").write_bytes(b"half")
    found = folder.load()
    assert found is not None
    assert found.facts.step == 3
    folder.save(state(4))
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["000000004"]


def test_a_state_that_a_kill_left_moved_aside_is_found(tmp_path: Path) -> None:
    """As where folders cannot be exchanged: moved, and the process killed before the new one had its name."""
    folder = RunFolder(tmp_path)
    folder.save(state(3))
    (tmp_path / "state" / "000000003").rename(tmp_path / "state" / ".000000003.old-abc0")
    found = folder.load()
    assert found is not None
    assert found.facts.step == 3


def test_a_failed_save_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.save(state(3))

    def full(*_: object) -> None:
        raise StorageError("no space")

    monkeypatch.setattr("tritune.cli.run_folder.write_tensors", full)
    with pytest.raises(StorageError):
        folder.save(state(4))
    found = folder.load()
    assert found is not None
    assert found.facts.step == 3


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save(state(3))
    tensors = next((tmp_path / "state").iterdir()) / "state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(Mismatch, match="safetensors"):
        folder.load()


def test_events_after_the_state_are_forgotten(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"kind": "step", "step": step}) for step in range(1, 6)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + '\n{"kind": "st')
    folder.forget_after(3)
    assert (tmp_path / "events.jsonl").read_text().splitlines() == lines[:3]


def test_a_run_has_to_be_begun(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="no run to resume"):
        RunFolder(tmp_path).begun()
