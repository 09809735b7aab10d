"""The GPU benchmark, on a processor: it trains what it says, and counts what it trains."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import SHAPES, Subject, Turns, Way, build, in_turn, line, rows_of

PLAIN = Way(compiled=False, recorded=False)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_it_learns_its_rows(name: str) -> None:
    base = build("tiny", 16, "cpu")
    before = {key: p.detach().clone() for key, p in base.parameters().items()}
    subject = Subject(base, name, rows_of(3, 16, SHAPES["tiny"][5]))
    assert subject.supervised == 3 * 16
    ways = in_turn(subject, turns=2, steps=3)
    assert list(ways) == [PLAIN]
    way = ways[PLAIN]
    assert [len(turn) for turn in way.seconds] == [3, 3]
    assert way.losses[-1] < way.losses[0]
    found = line(subject, PLAIN, way, matrix_rate=1e12)
    assert (found["compiled"], found["recorded"], str(PLAIN)) == (False, False, "")
    assert found["tokens_of_a_step"] == 3 * 16
    assert 0 < found["mfu"] < 1
    assert all(torch.equal(p, before[key]) for key, p in base.parameters().items())


def test_the_first_step_of_all_is_kept() -> None:
    subject = Subject(build("tiny", 16, "cpu"), "lora", rows_of(1, 16, SHAPES["tiny"][5]))
    way = Turns()
    with subject.base.bind(subject.delta):
        way.take(subject, None, 1)
        first = way.first
        way.take(subject, None, 1)
    assert 0 < first == way.first
