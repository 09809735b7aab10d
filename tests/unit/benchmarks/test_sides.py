"""Both sides of a measurement on a tiny base: the same rows give the same losses, so what is timed is the same work."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from benchmarks import ours
from benchmarks.gpu import build
from benchmarks.peers import bare
from benchmarks.protocol import Row, Setup, Spec, write_rows
from benchmarks.runner import RunFailed, in_turn
from benchmarks.worker import Clock, Prepare

OURS = Setup("tritune", "own", "float32", "default", 64, sort=True, tuned=False)
PEER = Setup("peft", "own", "float32", "sdpa", 3, sort=True, tuned=True)
ROWS = [Row([5, 6, 7, 8, 9], [10]), Row([11, 12], [13, 14]), Row([15, 16, 17], [18])]
STEPS = [[0, 1, 2], [2, 0], [1, 0, 2]]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    folder = tmp_path_factory.mktemp("bench")
    base = build("tiny", 64, "cpu")
    base.save_pretrained(folder / "base", dict(base.parameters()))
    write_rows(ROWS, folder / "rows.json")
    turns = [STEPS[:1], STEPS[1:]]
    return Spec(OURS, "full", {}, str(folder / "base"), str(folder / "rows.json"), turns, 1e-3)


def losses(prepare: Prepare, spec: Spec) -> list[float]:
    clock = Clock([len(turn) for turn in spec.turns], io.StringIO(), wait=lambda: None)
    prepare(spec, clock)()
    assert [len(turn) for turn in clock.seconds] == [1, 2]
    assert [len(pair) for rates in clock.rates for pair in rates.values()] == [2, 2, 2, 2]
    return clock.losses


def test_equal_learning(spec: Spec) -> None:
    """Full fine-tuning has no random start: three steps, the same losses, packed here and padded there."""
    mine, theirs = losses(ours.prepare, spec), losses(bare.prepare, replace(spec, setup=PEER))
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert mine[0] != pytest.approx(mine[2], rel=1e-3)  # it learned


def test_a_second_pass_with_remembered_texts_learns_the_same(spec: Spec) -> None:
    behind = replace(spec, method="ptuning", config={"tokens": 3, "start": "random", "placement": "suffix"})
    kept = losses(ours.prepare, replace(behind, again=True))
    assert kept == pytest.approx(losses(ours.prepare, behind), rel=1e-5)
    assert kept[0] != kept[2]


@pytest.mark.parametrize("left", [True, False])
def test_padding_keeps_every_token_and_label(left: bool) -> None:
    ids, mask, labels = bare.padded(ROWS, left=left)
    assert ids.shape == (3, 5)
    for i, row in enumerate(ROWS):
        assert ids[i][mask[i].bool()].tolist() == [*row.context, *row.target[:-1]]
        assert labels[i][mask[i].bool()].tolist()[len(row.context) - 1 :] == row.target
        assert int((labels[i] != bare.IGNORE).sum()) == len(row.target)
    assert bool(mask[1, 0]) is not left


def test_processes_take_turns_and_tell_what_they_cost(spec: Spec) -> None:
    outcome = in_turn({"ours": spec}, threads=1)["ours"]
    assert [len(turn) for turn in outcome.seconds] == [1, 2]
    assert len(outcome.losses) == len(outcome.flops) == len(spec.batches)
    assert outcome.flops[0] > outcome.flops[1]
    assert outcome.peak_bytes > 2**20
    assert outcome.threads == 1


def test_a_process_that_dies_says_why(spec: Spec) -> None:
    with pytest.raises(RunFailed, match="Unknown method"):
        in_turn({"ours": replace(spec, method="unheard-of")}, threads=1)
