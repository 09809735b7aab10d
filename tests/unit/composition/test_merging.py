"""Merged LoRAs against plain numpy, number by number. Beside PEFT they stand in tests/parity/test_composition.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tritune as tt
from tests.oracles import base_of, packed_logits, rows_of
from tests.unit.exchange.conftest import adapted
from tritune.adaptation import Adaptation
from tritune.composition.merging import HOWS, How, Merged, merge
from tritune.composition.stacking import stack
from tritune.errors import Mismatch
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.full import Full
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role

TINY = "llama-tied"
ROWS = rows_of((7, 1, 12))
WIDE = LoRA(rank=3, alpha=6.0, roles=(Role.ATTN_Q, Role.MLP_UP))
STABLE = LoRA(rank=4, alpha=3.0, rank_stabilised=True, roles=(Role.ATTN_Q, Role.MLP_DOWN))
BY_ROLE = LoRA(rank=2, ranks={Role.ATTN_V: 5}, alphas={Role.MLP_UP: 1.5}, start="pissa")
#: as large as any matrix of the tiny base: nothing is cut off
ALL = 64


def lora(config: LoRA, seed: int = 0) -> Adaptation:
    found = adapted(base_of(TINY), config)
    order = torch.Generator().manual_seed(seed)
    tensors = {n: t + 0.05 * torch.randn(t.shape, generator=order) for n, t in found.delta.export().items()}
    return Adaptation(found.base, found.task, config, tensors, found.origin)


def changes(part: Adaptation) -> dict[str, np.ndarray[Any, Any]]:
    """What is added to each site's weights, in float64."""
    found, tensors = {}, part.delta.export()
    for site in part.delta.sites():
        assert isinstance(part.config, LoRA)
        A, B = (tensors[f"{site.key}.{name}"].double().numpy() for name in "AB")
        rank = part.config.rank_at(site)
        alpha = part.config.alphas.get(site.role, part.config.alpha)
        found[site.key] = alpha / (rank**0.5 if part.config.rank_stabilised else rank) * (B @ A)
    return found


def assert_changes(got: Adaptation, wanted: Mapping[str, np.ndarray[Any, Any]]) -> None:
    found = changes(got)
    for key, change in found.items():
        expected = wanted.get(key, np.zeros_like(change))
        np.testing.assert_allclose(change, expected, atol=1e-5 * max(1e-3, np.abs(expected).max()))
    assert set(wanted) <= set(found)


def summed(parts: Sequence[Adaptation], weights: Sequence[float]) -> dict[str, np.ndarray[Any, Any]]:
    total: dict[str, Any] = {}
    for part, weight in zip(parts, weights, strict=True):
        for key, change in changes(part).items():
            total[key] = total.get(key, 0) + weight * change
    return total


@torch.no_grad()
def answers(adaptation: Adaptation) -> list[Tensor]:
    with adaptation.base.bind(adaptation.delta):
        return packed_logits(adaptation.base, ROWS)


# --- the weighted sum ---


@pytest.mark.parametrize("weights", [(0.5, 0.25, 0.25), (1.0, -2.0, 0.0)])
def test_linear_is_the_weighted_sum_of_what_each_adds(weights: tuple[float, ...]) -> None:
    parts = [lora(WIDE), lora(STABLE, 1), lora(BY_ROLE, 2)]
    found = merge(parts, weights=weights)
    assert_changes(found.adaptation, summed(parts, weights))
    assert (found.error, found.worst) == (0.0, 0.0)


def test_without_weights_it_is_the_average() -> None:
    parts = [lora(WIDE), lora(WIDE, 1)]
    assert_changes(merge(parts).adaptation, summed(parts, (0.5, 0.5)))
    assert merge(parts).adaptation.origin.made["weights"] == [0.5, 0.5]  # type: ignore[index]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("config", [WIDE, STABLE, BY_ROLE])
def test_one_alone_with_weight_one_answers_as_it_did(config: LoRA, how: How) -> None:
    part = lora(config)
    sparse = how not in ("linear", "svd")
    found = merge([part], how, weights=[1.0], density=1.0 if sparse else None)
    for got, wanted in zip(answers(found.adaptation), answers(part), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert found.error < 1e-6


def test_merged_with_weights_one_they_answer_as_stacked() -> None:
    parts = [lora(WIDE), lora(STABLE, 1)]
    for got, wanted in zip(answers(merge(parts, weights=[1.0, 1.0]).adaptation), answers(stack(parts)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_merged_they_reach_as_far_down_as_the_lowest() -> None:
    parts = [lora(LoRA(rank=2, top_layers=n, roles=(Role.ATTN_Q, Role.MLP_UP)), n) for n in (1, 2)]
    merged = merge(parts, "linear", weights=[1.0, 1.0]).adaptation
    assert merged.config.top_layers == 2  # type: ignore[attr-defined]
    wanted: dict[str, np.ndarray[Any, Any]] = {}
    for part in parts:
        for key, change in changes(part).items():
            wanted[key] = wanted.get(key, np.zeros_like(change)) + change
    assert_changes(merged, wanted)


def test_a_stack_of_loras_merges_as_its_sum() -> None:
    one, two, three = lora(WIDE), lora(STABLE, 1), lora(WIDE, 2)
    found = merge([stack([one, two]), three], weights=[1.0, 0.5])
    assert_changes(found.adaptation, summed([one, two, three], [1.0, 1.0, 0.5]))


def test_svd_is_the_nearest_of_its_rank_and_tells_how_far_off() -> None:
    parts, weights = [lora(WIDE), lora(STABLE, 1)], (0.7, 0.6)
    wanted, lost, whole = {}, 0.0, 0.0
    for key, change in summed(parts, weights).items():
        U, S, V = np.linalg.svd(change, full_matrices=False)
        wanted[key] = (U[:, :2] * S[:2]) @ V[:2]
        lost, whole = lost + (S[2:] ** 2).sum(), whole + (S**2).sum()
    found = merge(parts, "svd", weights=weights, rank=2)
    assert_changes(found.adaptation, wanted)
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert found.worst >= found.error > 0.01
    full = merge(parts, "svd", weights=weights, rank=ALL)
    assert full.error < 1e-6
    assert_changes(full.adaptation, summed(parts, weights))


def test_the_rank_is_by_default_the_largest_of_the_parts() -> None:
    config = merge([lora(WIDE), lora(STABLE, 1)], "svd").adaptation.config
    assert isinstance(config, LoRA)
    ranks = {role: config.ranks.get(role, config.rank) for role in (Role.ATTN_Q, Role.MLP_UP, Role.MLP_DOWN)}
    assert ranks == {Role.ATTN_Q: 4, Role.MLP_UP: 3, Role.MLP_DOWN: 4}


# --- TIES and DARE ---


def ties_by_the_paper(vectors: Sequence[Any], keep: float) -> Any:
    """Algorithm 1 of arXiv:2306.01708, one number after the other, on one site's vectors."""
    trimmed = []
    for vector in vectors:
        size = np.sort(np.abs(vector).ravel())[::-1][int(keep * vector.size) - 1]
        trimmed.append(np.where(np.abs(vector) >= size, vector, 0.0))
    merged = np.zeros_like(vectors[0])
    for place in np.ndindex(merged.shape):
        values = [t[place] for t in trimmed]
        sign = 1.0 if sum(values) >= 0 else -1.0
        agree = [v for v in values if v * sign > 0]
        merged[place] = sum(agree) / len(agree) if agree else 0.0
    return merged


@pytest.mark.parametrize("density", [0.2, 0.6])
def test_ties_is_the_papers_procedure(density: float) -> None:
    parts = [lora(STABLE), lora(STABLE, 1), lora(STABLE, 2)]
    each = [changes(part) for part in parts]
    wanted = {key: ties_by_the_paper([one[key] for one in each], density) for key in each[0]}
    assert_changes(merge(parts, "ties", density=density, rank=ALL).adaptation, wanted)


def test_dare_drops_the_share_it_says_enlarges_the_rest_and_draws_by_its_seed() -> None:
    part, density = lora(STABLE), 0.25
    found = changes(merge([part], "dare_linear", density=density, rank=ALL, seed=3).adaptation)
    kept = []
    for key, change in changes(part).items():
        is_kept = np.abs(found[key]) > 0.5 * np.abs(change) / density
        np.testing.assert_allclose(found[key], np.where(is_kept, change / density, 0), atol=1e-4 * np.abs(change).max())
        kept.append(is_kept.mean())
    assert np.mean(kept) == pytest.approx(density, abs=0.02)
    again, other = (
        changes(merge([part], "dare_linear", density=density, rank=ALL, seed=seed).adaptation) for seed in (3, 4)
    )
    assert all((again[key] == found[key]).all() and (other[key] != found[key]).any() for key in found)


def test_dare_ties_elects_among_what_was_kept() -> None:
    parts, density = [lora(STABLE), lora(STABLE, 1)], 0.5
    found = changes(merge(parts, "dare_ties", density=density, rank=ALL, seed=1).adaptation)
    for key, change in found.items():
        one, two = (changes(part)[key] / density for part in parts)
        possible = np.stack([np.zeros_like(one), one, two, (one + two) / 2])
        assert (np.abs(possible - change).min(0) < 1e-4 * np.abs(one).max()).all()


# --- an ordinary LoRA comes out; what cannot come in is told ---


def test_what_comes_out_is_an_ordinary_lora(tmp_path: Path) -> None:
    found: Merged = merge([lora(WIDE), lora(STABLE, 1)], "ties", density=0.5)
    stored = found.adaptation.save(tmp_path / "merged")
    assert stored.manifest.method == "lora"
    assert stored.manifest.made is not None
    assert {k: stored.manifest.made[k] for k in ("how", "density", "weights")} == {
        "how": "merged, ties", "density": 0.5, "weights": [1.0, 1.0],
    }  # fmt: skip
    loaded = tt.load(tmp_path / "merged", base=base_of(TINY))
    for got, wanted in zip(answers(loaded), answers(found.adaptation), strict=True):
        assert torch.equal(got, wanted)


def test_every_reason_is_told_at_once() -> None:
    base = base_of(TINY)
    others = [
        adapted(base, c) for c in (IA3(), Bottleneck(), PTuning(tokens=2, encoder="none"), Full(parts=("norms",)))
    ]
    with pytest.raises(Mismatch) as caught:
        merge([lora(WIDE), *others], "ties", weights=[1.0, -1.0], rank=0)
    told = {problem.where: problem.what for problem in caught.value.problems}
    assert "than add a low-rank term" in told["part 2 (ia3)"]
    assert "than add a low-rank term" in told["part 3 (bottleneck)"]
    assert "virtual tokens" in told["part 4 (ptuning)"]
    assert "replaces weights" in told["part 5 (full)"]
    assert {"weights", "rank", "density"} <= set(told)


@pytest.mark.parametrize(
    ("how", "options", "said"),
    [
        ("linear", {"rank": 3}, "'svd' is the same"),
        ("linear", {"density": 0.5}, "is not for linear"),
        ("dare_linear", {}, "needs it"),
        ("ties", {"density": 1.5}, "at most 1"),
        ("svd", {"weights": [float("nan")]}, "finite"),
        ("mean", {}, "known: linear, svd"),
    ],
)
def test_options_that_do_not_fit_are_refused(how: How, options: dict[str, Any], said: str) -> None:
    with pytest.raises(Mismatch, match=said):
        merge([lora(WIDE)], how, **options)
