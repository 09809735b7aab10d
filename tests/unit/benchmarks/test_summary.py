"""The last line of `make bench`: medians, their ratios, and what it says of a method that was not measured."""

from __future__ import annotations

import json

from benchmarks.summary import Measurement, assemble

KEYS = ["lora", "full", "ptuning", "ptuning-suffix-cached", "bottleneck", "several-at-once"]


def runs(role: str, rates: list[float], *, method: str = "lora", peak: int = 100, flops: int = 0) -> list[Measurement]:
    return [Measurement(method, role, 2.0, int(2 * rate), peak, flops, matrix_rate=50.0) for rate in rates]


def test_ratios_are_of_medians_not_of_means() -> None:
    found = runs("ours", [400, 400, 4000], flops=70) + runs("best", [100, 100, 1]) + runs("default", [50, 50, 9000])
    line = assemble(found)["lora"]
    assert line == {
        "vs_best": 4.0,
        "vs_default": 8.0,
        "mfu": 0.7,
        "peak_vs_best": 1.0,
        "tokens_per_second": 400.0,
        "equal_steps_vs_best": None,
        "equal_steps_peak_vs_best": None,
    }


def test_the_peers_steps_have_ratios_of_their_own() -> None:
    best = runs("best", [100], peak=200)
    line = assemble(runs("ours", [400], peak=180) + runs("equal", [300], peak=120) + best)["lora"]
    assert line is not None
    assert (line["vs_best"], line["peak_vs_best"]) == (4.0, 0.9)
    assert (line["equal_steps_vs_best"], line["equal_steps_peak_vs_best"]) == (3.0, 0.6)
    alone = assemble(runs("equal", [300], peak=120) + best)["lora"]
    assert alone is not None
    assert (alone["tokens_per_second"], alone["equal_steps_vs_best"]) == (None, 3.0)


def test_peak_memory_is_against_the_best_peer() -> None:
    found = runs("ours", [10], peak=60) + runs("best", [10], peak=100) + runs("default", [10], peak=20)
    line = assemble(found)["lora"]
    assert line is not None
    assert line["peak_vs_best"] == 0.6


def test_nothing_measured_is_null_and_every_name_is_there_in_order() -> None:
    assert list(assemble([])) == KEYS
    assert set(assemble([]).values()) == {None}
    json.dumps(assemble([]))


def test_a_peer_that_failed_leaves_its_ratio_open() -> None:
    line = assemble(runs("ours", [10], method="full") + runs("default", [5], method="full"))["full"]
    assert line is not None
    assert line["vs_best"] is None
    assert line["peak_vs_best"] is None
    assert line["vs_default"] == 2.0


def test_a_peer_alone_is_no_line() -> None:
    assert assemble(runs("best", [10], method="full"))["full"] is None


def test_a_method_that_no_peer_has_is_held_against_another_ones_peer_too() -> None:
    found = runs("ours", [900, 800, 10], method="prefix-suffix-cached") + runs("best", [100], method="ptuning")
    lines = assemble(found, also={"prefix-suffix-cached": "ptuning", "ia3": "ptuning"})
    line = lines["prefix-suffix-cached"]
    assert line is not None
    assert (line["vs_best"], line["vs_best_ptuning"]) == (None, 8.0)
    assert "ia3" not in lines


def test_further_methods_and_several_at_once_have_their_place() -> None:
    found = assemble(runs("ours", [10], method="ia3"), {"time_vs_alone": 0.6, "memory_vs_one": 1.9})
    assert list(found) == [*KEYS[:-1], "ia3", KEYS[-1]]
    assert found["several-at-once"] == {"time_vs_alone": 0.6, "memory_vs_one": 1.9}
