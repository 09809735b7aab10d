"""Remembered texts: the numbers of the base, each text computed once, bounds kept, the same numbers whatever came before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of
from tests.unit.methods.test_placement import PLACED, moved, rows
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.methods.lora import LoRA
from tritune.models import texts as texts_module
from tritune.models.base import Batch
from tritune.models.pieces import text_batch
from tritune.models.texts import TextCache, Texts
from tritune.text.encode import Encoded
from tritune.text.pack import WORTH_SHARING, scoring_batch, training_batch
from tritune.train.loop import batch_loss

NAME = "llama"


def known(given: Sequence[Encoded]) -> Texts:
    return {row.context: () for row in given}


def cache_of(
    given: Sequence[Encoded], folder: Path, *, memory: int = 1 << 30, disk: int = 1 << 30
) -> tuple[TextCache, list[int]]:
    """A cache of these rows' texts, and how many tokens went through the base for it so far, call by call."""
    base = base_of(NAME)
    computed: list[int] = []

    def compute(batch: Batch) -> Tensor:
        computed.append(len(batch.tokens_N))
        return base.keys_values(batch)

    return TextCache(
        compute,
        known(given),
        numbers=BYTES // 4,
        dim=2,
        dtype=base.dtype,
        path=folder / "texts",
        memory=memory,
        disk=disk,
    ), computed


def batches(given: Sequence[Encoded], seed: int) -> list[Batch]:
    """Training and scoring batches of rows in a random order."""
    order = random.Random(seed).sample(list(given), len(given))
    return [
        training_batch(order[:4]),
        scoring_batch(order[2:7]).batch,
        training_batch(order[6:7]),
        training_batch(order),
    ]


BYTES = 3 * 2 * 2 * 8 * 4  # of one token of this base: layers, key and value, heads, width, fp32


@pytest.mark.parametrize("common", [0, WORTH_SHARING])
@pytest.mark.parametrize(("memory", "disk"), [(1 << 30, 0), (0, 1 << 30), (40 * BYTES, 30 * BYTES), (0, 0)])
def test_remembered_is_computed(
    common: int, memory: int, disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, in the file, a part in each, nowhere; rows that are not known among those that are."""
    monkeypatch.setattr(texts_module, "GROUP_TOKENS", 12)
    given = rows(9, common)
    cache, _ = cache_of(given[:7], tmp_path, memory=memory, disk=disk)
    for seed in range(3):
        for batch in batches(given, seed):
            torch.testing.assert_close(
                cache.of(text_batch(batch)), base_of(NAME).keys_values(batch), rtol=1e-4, atol=1e-5
            )


def test_each_text_goes_through_the_base_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "GROUP_TOKENS", 12)
    given = rows(9)
    cache, computed = cache_of(given, tmp_path)
    for seed in range(3):
        for batch in batches(given, seed):
            cache.of(text_batch(batch))
    assert sum(computed) == sum(len(row.context) for row in given)
    assert len(computed) > 2, "in groups, when they are needed"


def test_what_all_texts_begin_with_is_held_once(tmp_path: Path) -> None:
    given = rows(7, common=WORTH_SHARING)
    own = sum(len(row.context) - WORTH_SHARING for row in given)
    cache, computed = cache_of(given, tmp_path, memory=own * BYTES, disk=0)
    for batch in batches(given, 0):
        cache.of(text_batch(batch))
    assert sum(computed) == 2 * WORTH_SHARING + own


@pytest.mark.parametrize("memory", [0, 20 * BYTES])
def test_bounds_are_kept(memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits nowhere is computed each time."""
    monkeypatch.setattr(texts_module, "GROUP_TOKENS", 12)
    given = rows(9)
    cache, computed = cache_of(given, tmp_path, memory=memory, disk=30 * BYTES)
    for batch in batches(given, 0):
        cache.of(text_batch(batch))
    assert (tmp_path / "texts").stat().st_size <= 30 * BYTES
    held = sum(t.numbers.numel() * 4 for t in cache._groups if t.numbers is not None and t.file_start is None)
    assert held <= memory
    before = len(computed)
    cache.of(text_batch(training_batch(given)))
    assert len(computed) == before + 1


def test_the_numbers_do_not_depend_on_what_came_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on after a stop begins with an empty cache and other batches."""
    monkeypatch.setattr(texts_module, "GROUP_TOKENS", 40)
    given = rows(9, common=WORTH_SHARING)
    results = []
    for i, order in enumerate(([0, 1, 2, 3], [3], [2, 3])):
        (tmp_path / str(i)).mkdir()
        cache, _ = cache_of(given, tmp_path / str(i), memory=60 * BYTES)
        found = [cache.of(text_batch(batches(given, 0)[j])) for j in order]
        results.append(found[-1])
    assert all(torch.equal(result, results[0]) for result in results)


# --- in a base ---


def count(base_name: str, seen: list[int]) -> torch.utils.hooks.RemovableHandle:
    mlp = base_of(base_name).model.model.layers[0].mlp
    return mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-2]))


def test_training_and_scoring_from_remembered_texts_are_training_and_scoring() -> None:
    base, delta, given = base_of(NAME), moved(PLACED["suffix"], base_of(NAME)), rows(6)
    results = []
    seen: list[int] = []
    handle = count(NAME, seen)
    try:
        for texts in ({}, known(given)):
            delta.zero_grad()
            with base.remembering(texts), base.bind(delta):
                for _ in range(2):  # the second time nothing of the texts is computed
                    loss = batch_loss(base, training_batch(given))
                    scores = choice_log_likelihoods(base, given)
                loss.backward()
            results.append((loss.detach(), scores, [p.grad.clone() for p in delta.parameters() if p.grad is not None]))
    finally:
        handle.remove()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    n_text = sum(len(row.context) for row in given)
    behind = sum(3 + len(row.target) - 1 for row in given)
    assert n_text not in seen[-3:], "the last training and scoring pass"
    assert behind in seen[-3:]


def test_what_acts_inside_the_base_sees_no_remembered_text() -> None:
    base, given = base_of(NAME), rows(4)
    delta = moved(LoRA(rank=2), base)
    with base.bind(delta):
        wanted = choice_log_likelihoods(base, given)
        with base.remembering(known(given)):
            assert choice_log_likelihoods(base, given) == wanted


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base, given = base_of(NAME), rows(4)
    with base.remembering(known(given), memory=0), base.bind(moved(PLACED["suffix"], base)):
        choice_log_likelihoods(base, given)
        assert [path.name for path in tmp_path.rglob("texts")] == ["texts"]
    assert not list(tmp_path.iterdir())
    assert base._texts is None
