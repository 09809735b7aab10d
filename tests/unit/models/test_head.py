"""The head: a loss taken in pieces is the loss of whole logits, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.unit.models.test_fast import batch, shaken
from tritune.methods.full import Full
from tritune.methods.lora import LoRA
from tritune.models import head
from tritune.models.base import IGNORE, Role
from tritune.models.head import SummedLoss
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.spec import MethodConfig
from tritune.train.loop import batch_loss

V = 40


def slopes(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(3 * loss, inputs))


@pytest.mark.parametrize("rows_at_once", [1, 4, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0, 3])
def test_pieces_add_up(rows_at_once: int, bias: bool, ignored: int) -> None:
    torch.manual_seed(0)
    x_KD = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None
    labels_K = torch.randint(0, V, (7,))
    labels_K[7 - ignored :] = IGNORE
    wanted = F.cross_entropy(F.linear(x_KD, weight_VD, bias_V), labels_K, reduction="sum")
    loss = SummedLoss.apply(x_KD, weight_VD, bias_V, labels_K, rows_at_once * 4 * V)
    torch.testing.assert_close(loss, wanted)
    inputs = [x_KD, weight_VD, *([] if bias_V is None else [bias_V])]
    torch.testing.assert_close(slopes(loss, *inputs), slopes(wanted, *inputs))


def test_a_frozen_head_gets_no_gradient() -> None:
    x_KD, weight_VD = torch.randn(3, 5, requires_grad=True), torch.randn(V, 5)
    SummedLoss.apply(x_KD, weight_VD, None, torch.tensor([1, 2, 3]), 1).backward()
    assert x_KD.grad is not None
    assert weight_VD.grad is None


def loss_and_slopes(base: Base, config: MethodConfig) -> tuple[float, dict[str, Tensor]]:
    delta = shaken(base, config, seed=1)
    with base.bind(delta):
        loss = batch_loss(base, batch())
        (loss / 5).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {n: p.grad for n, p in delta.trainable().items() if p.grad is not None}


@pytest.mark.parametrize(
    "config", [LoRA(rank=2), LoRA(rank=2, roles=(Role.HEAD,)), Full()], ids=["lora", "at head", "full"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_base_learns_the_same_from_pieces(family: str, config: MethodConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the head cannot do it: where something acts on it, or the family bends its logits."""
    base = tiny_base(family)
    wanted_loss, wanted = loss_and_slopes(base, config)
    monkeypatch.setattr(head, "CHUNK", 1)
    loss, found = loss_and_slopes(base, config)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert found.keys() == wanted.keys()
    for name, slope in wanted.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()) + 1e-9)


def test_many_positions_are_taken_in_pieces_and_few_are_not() -> None:
    base = tiny_base("llama")
    rows = head.CHUNK // (4 * base.config.vocab_size)
    assert not base._head.pays(rows - 1)
    assert base._head.pays(rows + 1)
    assert not tiny_base("gemma2")._head.pays(rows + 1)


def test_two_bases_on_one_model_share_its_head() -> None:
    base = tiny_base("llama")
    again = Base(base.model, base.tokenizer, "again", base.digests)
    assert again._head is base._head


def narrow(seed: int) -> Tensor:
    return torch.randn(V, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("at_once", [7, V, 100])
def test_logits_of_narrow_numbers_are_exact_to_fp32(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "WIDENED", at_once)
    x_KD, weight_VD = narrow(0)[:9], narrow(1)
    before = torch.backends.mkldnn.matmul.fp32_precision
    found = head.product(x_KD, weight_VD)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    torch.testing.assert_close(found.double(), x_KD.double() @ weight_VD.double().T, rtol=1e-5, atol=1e-5)


def test_what_comes_back_through_a_narrow_head() -> None:
    base = tiny_base("llama", dtype=torch.bfloat16)
    weight = base._head.module.weight
    x_KD = narrow(2)[:6, : weight.shape[1]].requires_grad_()
    labels_K = torch.arange(6)
    logits_KV = base._head(x_KD[None])[0]
    assert logits_KV.dtype is torch.float32
    (found,) = torch.autograd.grad(F.cross_entropy(logits_KV, labels_K, reduction="sum"), x_KD)
    wide = x_KD.detach().float().requires_grad_()
    wanted = torch.autograd.grad(F.cross_entropy(wide @ weight.float().T, labels_K, reduction="sum"), wide)[0]
    assert float((found - wanted).square().mean().sqrt()) < 0.01 * float(wanted.square().mean().sqrt())
