"""What is made again in the backward instead of kept, and weights that are held once."""

from __future__ import annotations

import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.unit.models.test_fast import batch, loss_and_slopes
from tritune.methods import method
from tritune.methods.full import Full
from tritune.models import memory
from tritune.models.load import load_base
from tritune.models.memory import MadeAgain
from tritune.models.tiny import tiny_base
from tritune.run import Training
from tritune.text.encode import Encoded
from tritune.train.loop import Measured, train


def squared(again: MadeAgain, x: Tensor) -> Tensor:
    return again.offer(x * x, partial(torch.square, x.detach()))


def test_what_can_be_made_again_is_not_kept() -> None:
    again, weight = MadeAgain(), torch.randn(3, 4, requires_grad=True)
    x = torch.randn(5, 4)
    with again.instead_of_kept():
        made = squared(again, x)
        y = made.view(1, 5, 4)[0] @ weight.T
    gone = weakref.ref(made)
    del made
    assert gone() is None
    y.sum().backward()
    torch.testing.assert_close(weight.grad, (x * x).sum(0).expand(3, 4))


def test_what_was_written_into_since_is_kept() -> None:
    again, weight = MadeAgain(), torch.randn(3, 4, requires_grad=True)
    x = torch.randn(5, 4)
    with again.instead_of_kept():
        made = squared(again, x)
        made += 1
        (made @ weight.T).sum().backward()
    torch.testing.assert_close(weight.grad, (x * x + 1).sum(0).expand(3, 4))


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be made again is too much to keep."""
    monkeypatch.setattr(memory, "KEPT", 0)


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize("kind", ["lora", "full", "ia3", "bottleneck"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_gradients_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch, family: str, kind: str) -> None:
    base = tiny_base(family)
    loss, slopes = loss_and_slopes(base, method(kind).variants[0], twins=True)
    monkeypatch.setattr(MadeAgain, "offer", lambda self, made, make: made)
    kept_loss, kept_slopes = loss_and_slopes(base, method(kind).variants[0], twins=True)
    assert loss == kept_loss
    assert slopes.keys() == kept_slopes.keys()
    for name, slope in kept_slopes.items():
        assert torch.equal(slopes[name], slope), name


def remade(monkeypatch: pytest.MonkeyPatch, kind: str) -> list[Tensor]:
    """What a step of a tiny base did not keep."""
    made: list[Tensor] = []
    keep = MadeAgain._kept

    def watched(self: MadeAgain, tensor: Tensor) -> object:
        kept = keep(self, tensor)
        if not isinstance(kept, Tensor):
            made.append(kept.made())
        return kept

    monkeypatch.setattr(MadeAgain, "_kept", watched)
    loss_and_slopes(tiny_base("llama"), method(kind).variants[0], twins=True)
    return made


@pytest.mark.usefixtures("dear")
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_norms_and_gated_products_are_not_kept(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Per layer, LoRA's maps read two norms and one product, and keep none of the three."""
    made, config = remade(monkeypatch, kind), tiny_base("llama").config
    assert {t.shape[-1] for t in made} == {config.hidden_size, config.intermediate_size}
    assert len(made) >= 3 * config.num_hidden_layers - 1  # few rows go into the last feed-forward, and are copied


@pytest.mark.parametrize(("kind", "again"), [("lora", False), ("full", True)])
def test_little_is_kept_unless_all_weights_are_there_twice(
    monkeypatch: pytest.MonkeyPatch, kind: str, again: bool
) -> None:
    assert bool(remade(monkeypatch, kind)) is again


def test_no_weight_stays_in_the_file_it_came_from(tmp_path: Path) -> None:
    folder, made = tmp_path / "base", tiny_base("llama")
    made.save_pretrained(folder, dict(made.model.state_dict()))
    base = load_base(folder, dtype="float32", device="cpu")
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(folder) not in maps.read_text(encoding="utf-8")
    assert all(p.untyped_storage().resizable() for p in base.model.parameters())


def test_weights_that_are_set_aside_are_read_as_they_were() -> None:
    base = tiny_base("qwen2")  # has biases, which are joined too
    rows, at = batch(), torch.arange(33)
    before = {name: p.clone() for name, p in base.parameters().items()}
    want = base.logits(rows, at)
    with base.without(before):
        assert not any(p.untyped_storage().resizable() for p in base.parameters().values())
        for name, p in base.parameters().items():
            assert torch.equal(p, before[name])
        torch.testing.assert_close(base.logits(rows, at), want)
    for name, p in base.parameters().items():
        assert torch.equal(p, before[name])
        assert p.untyped_storage().resizable()
    torch.testing.assert_close(base.logits(rows, at), want)


#: in a process of its own: what this one has freed before may be its again
SET_ASIDE = """
import psutil, torch
from tritune.models.memory import aside
weights = [torch.nn.Parameter(torch.randn(4_000_000)) for _ in range(4)]
resident = [psutil.Process().memory_info().rss]
with aside(weights):
    resident.append(psutil.Process().memory_info().rss)
    assert float(weights[3].detach()[:10].abs().sum()) > 0
resident.append(psutil.Process().memory_info().rss)
print(*resident)
"""


def test_weights_that_are_set_aside_take_no_memory() -> None:
    said = subprocess.run([sys.executable, "-c", SET_ASIDE], check=True, capture_output=True, text=True).stdout
    before, meanwhile, after = map(int, said.split())
    assert before - meanwhile > 50e6
    assert after - meanwhile > 50e6


def test_full_fine_tuning_keeps_what_it_replaces_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    base, delta = tiny_base("llama"), method("full").init(Full(), tiny_base("llama"), torch.Generator())
    aside_now: list[bool] = []
    rows = [Encoded(str(i), (5, 6 + i, 7), (8,)) for i in range(4)]

    def evaluate() -> Measured:
        aside_now.extend(not p.untyped_storage().resizable() for p in base.parameters().values())
        return Measured(0.5, 1.0)

    before = {name: p.clone() for name, p in base.parameters().items()}
    list(train(Training(epochs=1, evaluations=1), base, delta, rows, learning_rate=1e-3, seed=0, evaluate=evaluate))
    assert aside_now
    assert all(aside_now)
    for name, p in base.parameters().items():
        assert torch.equal(p, before[name])
