"""A base that computes round numbers of tokens: its layers see few numbers, and nobody notices the rest.

What methods make of it, alone, is a law (`tests/laws`); here: what is remembered, several at once, and bf16 itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of
from tests.unit.methods.test_placement import PLACED, moved, rows
from tritune.methods.base import Bank, Delta
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.models import round_numbers
from tritune.models.pretrained import Base
from tritune.models.round_numbers import missing
from tritune.models.tiny import tiny_base
from tritune.spec import MethodConfig
from tritune.text.encode import Encoded
from tritune.text.pack import WORTH_SHARING, training_batch
from tritune.train.loop import batch_loss

CONFIGS: dict[str, MethodConfig] = {
    **PLACED,
    "lora": LoRA(rank=2),
    "top": LoRA(rank=2, top_layers=1),
    "deep": Prefix(tokens=3),
}


def slopes(base: Base, deltas: list[Delta], given: list[Encoded], *, remember: bool = False) -> Mapping[str, Tensor]:
    """The loss of a batch and its gradients; computed twice, so that what is remembered is used. Several deltas take the rows
    in turn."""
    texts = {row.context: (row.target[:-1],) for row in given}
    alone = len(deltas) == 1
    slots = None if alone else sorted(i % len(deltas) for i in range(len(given)))
    parameters = {f"{i}.{name}": p for i, delta in enumerate(deltas) for name, p in delta.trainable().items()}
    with base.remembering(texts) if remember else nullcontext():
        for _ in range(2):
            for parameter in parameters.values():
                parameter.grad = None
            with base.bind(deltas[0] if alone else Bank(dict(enumerate(deltas)))):
                loss = batch_loss(base, training_batch(given, slots))
                loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}


def plain_and_round(
    monkeypatch: pytest.MonkeyPatch, kinds: list[str], given: list[Encoded], *, remember: bool = False
) -> None:
    base = base_of("llama")
    found = []
    for wanted in (False, True):
        monkeypatch.setattr(round_numbers, "wanted", lambda *_, wanted=wanted: wanted)
        found.append(slopes(base, [moved(CONFIGS[kind], base) for kind in kinds], given, remember=remember))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)  # sums of products in another order


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("common", [0, WORTH_SHARING])
@pytest.mark.parametrize("remember", [False, True])
def test_gradients_are_the_same(kind: str, common: int, remember: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_and_round(monkeypatch, [kind], rows(9, common), remember=remember)


@pytest.mark.parametrize("other", ["prefix", "suffix", "lora"])
def test_several_at_once(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_and_round(monkeypatch, ["lora", other], rows(9))


def test_layers_see_round_numbers_in_bf16_only() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_base("llama", dtype=dtype)
        seen: list[int] = []
        base.model.model.layers[0].mlp.register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0].shape[-2])
        )
        for n in range(4, 10):
            base.logits(training_batch(rows(n)), torch.tensor([0]))
        assert all(missing(n) == 0 for n in seen) == (dtype is torch.bfloat16)
