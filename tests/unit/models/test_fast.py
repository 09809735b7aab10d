"""Fast twins against the modules they stand in for: logits and gradients, whatever is bound."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tritune.methods import METHODS, method, method_of
from tritune.methods.base import Bank, Delta
from tritune.methods.full import Full
from tritune.methods.ia3 import IA3, Ia3Delta
from tritune.methods.lora import LoraDelta
from tritune.methods.ptuning import PTuning
from tritune.methods.stack import Stack
from tritune.models import attention
from tritune.models.base import BARE, IGNORE, Batch, Span
from tritune.models.pretrained import Base
from tritune.models.probe import TOLERANCE, probe
from tritune.models.tiny import tiny_base
from tritune.spec import MethodConfig, Quantisation
from tritune.train.loop import batch_loss

#: the families that have twins; Qwen 2 has biases, Qwen 3 norms queries and keys, Mistral looks back six tokens
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def batch() -> Batch:
    """Rows of several lengths behind a shared beginning, and one by itself."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 300, (33,), generator=generator)
    labels = torch.full((33,), IGNORE)
    labels[[4, 12, 20, 30, 32]] = torch.randint(3, 300, (5,), generator=generator)
    return Batch(tokens, (Span(0, 5), Span(5, 8, (0,), 6), Span(13, 9, (0,), 9), Span(22, 11, (), 8)), labels)


def batch_labels(given: Batch) -> Tensor:
    assert given.labels_N is not None
    return given.labels_N


def shaken(base: Base, config: MethodConfig, seed: int) -> Delta:
    """A delta none of whose tensors is zero."""
    delta = method_of(config).init(config, base, torch.Generator().manual_seed(seed)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return delta


def loss_and_slopes(base: Base, config: MethodConfig, twins: bool) -> tuple[float, dict[str, Tensor]]:
    delta = shaken(base, config, seed=1)
    base.twins = twins
    with base.bind(delta):
        loss = batch_loss(base, batch())
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {n: p.grad for n, p in delta.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_twins_learn_what_the_modules_learn(family: str, kind: str) -> None:
    base = tiny_base(family)
    for config in method(kind).variants:
        assert_twins_agree(base, config)


def test_twins_learn_biases_where_the_matrices_stay() -> None:
    assert_twins_agree(tiny_base("qwen2"), Full(parts=("bias",)))


def assert_twins_agree(base: Base, config: MethodConfig) -> None:
    (fast, fast_slopes), (slow, slow_slopes) = (loss_and_slopes(base, config, twins) for twins in (True, False))
    assert fast == pytest.approx(slow, rel=1e-5)
    assert fast_slopes.keys() == slow_slopes.keys()
    for name, slope in slow_slopes.items():
        torch.testing.assert_close(fast_slopes[name], slope, rtol=1e-3, atol=1e-4, msg=name)


def mixed_loss_and_slopes(base: Base, kinds: Sequence[str], twins: bool) -> tuple[float, dict[str, Tensor]]:
    """Three spans of one slot's, of which the first is shared, and one of another's; BARE is a third."""
    deltas = {7 - i: shaken(base, method(kind).variants[0], seed=i) for i, kind in enumerate(kinds)}
    base.twins = twins
    rows = batch()
    spans = (*rows.spans, Span(33, 4))
    labels = torch.cat([batch_labels(rows), torch.tensor([IGNORE, IGNORE, IGNORE, 5])])
    mixed = Batch(torch.cat([rows.tokens_N, rows.tokens_N[:4]]), spans, labels, (7, 7, 7, 6, BARE))
    with base.bind(Bank(deltas)):
        loss = batch_loss(base, mixed)
        loss.backward()  # type: ignore[no-untyped-call]
    named = {f"{slot}.{n}": p for slot, delta in deltas.items() for n, p in delta.trainable().items()}
    return float(loss.detach()), {n: p.grad for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize(
    "kinds", [("lora", "lora"), ("lora", "ptuning"), ("lora", "bottleneck"), ("lora", "ia3")], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_twins_keep_the_rows_of_several_adaptations_apart(family: str, kinds: Sequence[str]) -> None:
    base = tiny_base(family)
    (fast, fast_slopes), (slow, slow_slopes) = (mixed_loss_and_slopes(base, kinds, twins) for twins in (True, False))
    assert fast == pytest.approx(slow, rel=1e-5)
    assert fast_slopes.keys() == slow_slopes.keys()
    for name, slope in slow_slopes.items():
        torch.testing.assert_close(fast_slopes[name], slope, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["full", "lora", "bottleneck", "ia3", "ptuning"])
@pytest.mark.parametrize("asked", [[4], [32, 4, 20, 4, 4], [12, 20]], ids=str)
def test_positions_may_be_few_in_any_order_and_more_than_once(kind: str, asked: list[int]) -> None:
    """Only they go on behind the last layer's attention; what is asked for twice learns twice, and no more."""
    base, rows, at_K = tiny_base("llama"), batch(), torch.tensor(asked)
    given = torch.randn(len(asked), 300, generator=torch.Generator().manual_seed(5))
    found = []
    for twins in (True, False):
        base.twins = twins
        delta = shaken(base, method(kind).variants[0], seed=1)
        with base.bind(delta):
            logits_KV = base.logits(rows, at_K)
            (logits_KV * given).sum().backward()
        found.append((logits_KV.detach(), {n: p.grad for n, p in delta.trainable().items() if p.grad is not None}))
    (fast, fast_slopes), (slow, slow_slopes) = found
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert fast_slopes.keys() == slow_slopes.keys()
    for name, slope in slow_slopes.items():
        torch.testing.assert_close(fast_slopes[name], slope, rtol=1e-3, atol=1e-3, msg=name)


def test_tokens_that_nobody_reads_end_with_the_last_layers_attention() -> None:
    base = tiny_base("llama")
    layer = base.model.get_submodule(f"model.layers.{base.config.num_hidden_layers - 1}")
    weights = sum(m.weight.numel() for m in (layer.self_attn.o_proj, *layer.mlp.children()) if hasattr(m, "weight"))

    def multiplied(at_K: Tensor) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            base.logits(batch(), at_K)
        return counter.get_total_flops() - 2 * len(at_K) * base.model.get_output_embeddings().weight.numel()

    assert multiplied(torch.arange(33)) - multiplied(torch.tensor([4, 32])) == 2 * 31 * weights


def test_who_calls_the_model_itself_gets_all_of_its_logits() -> None:
    base, tokens = tiny_base("llama"), batch().tokens_N

    @torch.no_grad()
    def called() -> Tensor:
        base.model.set_attn_implementation("eager")
        logits: Tensor = base.model(input_ids=tokens[None], use_cache=False).logits
        base.model.set_attn_implementation(attention.NAME)
        return logits

    wanted = called()
    base.logits(batch(), torch.tensor([4]))
    torch.testing.assert_close(called(), wanted)


def test_a_bank_of_low_rank_terms_calls_no_adaptation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise several at once would cost one gathering per slot and site."""
    base = tiny_base("llama")
    first, second = method("lora").variants[:2]
    bank = Bank({7: shaken(base, first, seed=0), 6: shaken(base, second, seed=1)})
    rows = replace(batch(), slots=(7, 7, 7, 6))
    with base.bind(bank):
        fast = base.logits(rows, torch.arange(33))
        monkeypatch.setattr(LoraDelta, "edit", lambda *given: pytest.fail("an adaptation was called"))
        torch.testing.assert_close(base.logits(rows, torch.arange(33)), fast)
        with pytest.raises(AssertionError, match="slots"):
            base.logits(batch(), torch.arange(33))


@pytest.mark.parametrize("config", [IA3(), Stack.of([PTuning(tokens=2), IA3()])], ids=["alone", "behind a prompt"])
def test_scales_are_a_part_of_the_product(monkeypatch: pytest.MonkeyPatch, config: MethodConfig) -> None:
    """Otherwise scaled keys and values would take q, k and v out of their one product."""
    base = tiny_base("llama")
    delta = shaken(base, config, seed=0)
    with base.bind(delta):
        fast = base.logits(batch(), torch.arange(33))
        for called in ("enter", "edit"):
            monkeypatch.setattr(Ia3Delta, called, lambda *given: pytest.fail("the scales were called"))
        torch.testing.assert_close(base.logits(batch(), torch.arange(33)), fast)


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


@pytest.mark.parametrize("form", [None, "int8", "nf4", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_is_no_reason_to_give_twins_up(family: str, form: Quantisation | None) -> None:
    """An int8 base in bf16 ran on its own modules, slower and in more memory, because both round; nobody was told."""
    base = tiny_base(family, dtype=torch.bfloat16, quantise=form)
    probe(base)
    assert base.twins


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_twin_that_is_wrong_is_given_up_at_load(dtype: torch.dtype) -> None:
    """A later transformers may change what a class computes: the base then runs its own modules, and answers as they do."""
    base = tiny_base("llama", dtype=dtype)
    norm = base.model.get_submodule("model.norm")
    own = norm.forward
    norm.forward = lambda x: own(x) * (1 + base._stream.fast)
    assert probe(base) <= TOLERANCE[dtype]
    assert not base.twins


def test_a_twin_that_cannot_run_is_given_up_at_load() -> None:
    base = tiny_base("llama")
    norm = base.model.get_submodule("model.norm")
    own = norm.forward

    def forward(x: Tensor) -> Tensor:
        if base._stream.fast:
            raise TypeError("an argument that nobody knew")
        answer: Tensor = own(x)
        return answer

    norm.forward = forward
    probe(base)
    assert not base.twins


def test_weights_of_joined_maps_are_held_once() -> None:
    base = tiny_base("llama")
    q, k = (base.model.get_submodule(f"model.layers.0.self_attn.{n}_proj").weight for n in "qk")
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert k.data_ptr() == q.data_ptr() + q.numel() * q.element_size()


def test_two_bases_on_one_model_know_of_each_other() -> None:
    """Otherwise the later one's twins would pass over what is bound to the earlier one."""
    first = tiny_base("llama")
    second = Base(first.model, first.tokenizer, "second", first.digests)
    delta = shaken(first, method("lora").variants[0], seed=1)
    bare = second.logits(batch(), torch.arange(33))
    with first.bind(delta):
        assert not torch.allclose(first.logits(batch(), torch.arange(33)), bare, atol=1e-3)
        with pytest.raises(AssertionError, match="already bound"), second.bind(delta):
            pass


def test_a_copied_model_computes_with_its_own_weights() -> None:
    first = tiny_base("llama")
    copied = Base(copy.deepcopy(first.model), first.tokenizer, "copied", first.digests)
    with torch.no_grad():
        copied.model.get_submodule("model.layers.0.self_attn.q_proj").weight.zero_()
    fast = copied.logits(batch(), torch.arange(33))
    assert not torch.allclose(fast, first.logits(batch(), torch.arange(33)), atol=1e-3)
    copied.twins = False
    torch.testing.assert_close(fast, copied.logits(batch(), torch.arange(33)), rtol=1e-4, atol=1e-5)
