"""Fast twins against the modules they stand in for: logits and gradients, whatever is bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tritune.methods import METHODS, method
from tritune.models.base import IGNORE, Batch, Span
from tritune.models.load import Base
from tritune.models.probe import TOLERANCE, probe
from tritune.models.tiny import tiny_base
from tritune.train.loop import batch_loss

#: the families that have twins; Qwen 2 has biases, Qwen 3 norms queries and keys, Mistral looks back six tokens
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def batch() -> Batch:
    """Rows of several lengths behind a shared beginning, and one by itself."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 300, (33,), generator=generator)
    labels = torch.full((33,), IGNORE)
    labels[[4, 12, 20, 30, 32]] = torch.randint(3, 300, (5,), generator=generator)
    return Batch(
        tokens, (Span(0, 5), Span(5, 8, (0,), text=7), Span(13, 9, (0,), text=9), Span(22, 11, text=10)), labels
    )


def loss_and_slopes(base: Base, kind: str, variant: int, twins: bool) -> tuple[float, dict[str, Tensor]]:
    delta = method(kind).init(method(kind).variants[variant], base, torch.Generator().manual_seed(1)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    base.twins = twins
    with base.bind(delta):
        loss = batch_loss(base, batch())
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {n: p.grad for n, p in delta.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_twins_learn_what_the_modules_learn(family: str, kind: str) -> None:
    base = tiny_base(family)
    for variant in range(len(method(kind).variants)):
        (fast, fast_slopes), (slow, slow_slopes) = (loss_and_slopes(base, kind, variant, t) for t in (True, False))
        assert fast == pytest.approx(slow, rel=1e-5)
        assert fast_slopes.keys() == slow_slopes.keys()
        for name, slope in slow_slopes.items():
            torch.testing.assert_close(fast_slopes[name], slope, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_twins_use_them(family: str) -> None:
    """Otherwise the test above compares the slow twin with itself."""
    base = tiny_base(family)
    assert base.twins
    fast = base.logits(batch(), torch.arange(33))
    base.twins = False
    slow = base.logits(batch(), torch.arange(33))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    assert not torch.equal(fast, slow)


def test_a_twin_that_is_wrong_is_given_up_at_load() -> None:
    """A later transformers may change what a class computes: the base then runs its own modules, and answers as they do."""
    base = tiny_base("llama")
    norm = base.model.get_submodule("model.norm")
    own = norm.forward
    norm.forward = lambda x: own(x) * (1 + base._stream.fast)
    assert probe(base) <= TOLERANCE[torch.float32]
    assert not base.twins


def test_weights_of_joined_maps_are_held_once() -> None:
    base = tiny_base("llama")
    q, k = (base.model.get_submodule(f"model.layers.0.self_attn.{n}_proj").weight for n in "qk")
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()
