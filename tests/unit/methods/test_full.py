"""Full fine-tuning of parts: which weights move, how fast, and what pulls them back."""

from __future__ import annotations

import pytest
import torch

from tests.laws.conftest import training_rows
from tests.oracles import base_of, stock_logits, stock_of
from tritune.errors import Mismatch
from tritune.methods.base import Delta
from tritune.methods.full import METHOD, Full, FullDelta
from tritune.models.pretrained import Base
from tritune.models.tiny import CONFIGS, tiny_base
from tritune.run import Training
from tritune.train.loop import train

SHORT = Training(epochs=2.0, batch_tokens=60, warmup=0.0, schedule="constant", evaluations=0, clip=None)


def fresh(config: Full, base: Base) -> Delta:
    return METHOD.init(config, base, torch.Generator())


def trained(config: Full, base: Base, rate: float = 1e-2) -> Delta:
    delta = fresh(config, base)
    for _ in train(SHORT, base, delta, training_rows(), learning_rate=rate, seed=0):
        pass
    return delta


def distance(delta: Delta, base: Base) -> float:
    own = base.parameters()
    return float(sum((p - own[name]).square().sum() for name, p in delta.trainable().items()).detach() ** 0.5)  # type: ignore[union-attr]


# --- which weights ---


@pytest.mark.parametrize("name", ["llama-tied", "llama", "gpt2", "gpt-neox", "opt", "opt-post-norm", "qwen3", "gemma2"])
def test_the_parts_are_what_they_are_called(name: str) -> None:
    base = base_of(name)
    own = base.parameters()
    norms = set(fresh(Full(parts=("norms",)), base).trainable())
    assert norms == {n for n in own if ("norm" in n or ".ln_" in n) and own[n].ndim == 1}
    embeddings = set(fresh(Full(parts=("embeddings",)), base).trainable())
    assert embeddings == {n for n in own if "embed" in n or ".wte" in n or ".wpe" in n}
    layers = set(fresh(Full(parts=("layers",)), base).trainable())
    assert layers == {n for n in own if any(f".{i}." in n for i in range(3))}
    assert set(fresh(Full(), base).trainable()) == set(own)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt", "qwen2"])
def test_bitfit_moves_every_bias_and_nothing_else(name: str) -> None:
    base = base_of(name)
    assert set(fresh(Full(parts=("bias",)), base).trainable()) == {n for n in base.parameters() if n.endswith(".bias")}


def test_top_layers_leave_what_lies_below() -> None:
    base = base_of("llama")
    chosen = set(fresh(Full(top_layers=2), base).trainable())
    below = {n for n in base.parameters() if "embed" in n or ".layers.0." in n}
    assert chosen == set(base.parameters()) - below
    assert "lm_head.weight" in chosen
    assert "lm_head.weight" not in fresh(Full(top_layers=2), base_of("llama-tied")).trainable()
    norms = set(fresh(Full(parts=("norms",), top_layers=1), base).trainable())
    assert norms == {f"model.layers.2.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")} | {
        "model.norm.weight"
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_what_runs_in_front_of_the_layers_stays_with_those_below(name: str) -> None:
    """OPT-350m projects its narrow embeddings up: by name that is neither an embedding nor a part of a layer."""
    base, model = base_of(name), stock_of(name)
    top = base.cache_shape[0] - 1
    ran: list[str] = []
    hooks = [m.register_forward_hook(lambda *_, path=p: ran.append(path)) for p, m in model.named_modules()]  # type: ignore[misc]
    stock_logits(model, [5, 6, 7])
    for hook in hooks:
        hook.remove()
    first = next(i for i, path in enumerate(ran) if f".{top}." in path)
    own = base.parameters()
    below = {f"{path}.{n}" for path in ran[:first] for n, _ in model.get_submodule(path).named_parameters()}
    delta = fresh(Full(top_layers=1), base)
    assert set(delta.trainable()) == set(own) - below
    factors = fresh(Full(layer_decay=0.5), base).rate_factors()
    in_front = set(ran[: next(i for i, path in enumerate(ran) if ".0." in path)])
    assert {factors[n] for n in own if n.rpartition(".")[0] in in_front} == {0.5**4}, "deepest of all"


def test_parts_that_are_not_there_are_named_at_once() -> None:
    with pytest.raises(Mismatch) as caught:
        fresh(Full(parts=("bias", "head", "norms"), top_layers=4), base_of("llama-tied"))
    assert [p.where for p in caught.value.problems] == ["part 'bias'", "part 'head'", "top_layers"]
    assert "tied" in str(caught.value)


# --- layer by layer ---


def test_each_layer_learns_slower_than_the_one_behind_it() -> None:
    base = base_of("llama")
    factors = fresh(Full(layer_decay=0.5), base).rate_factors()
    assert set(factors) == set(base.parameters())
    assert factors["lm_head.weight"] == factors["model.norm.weight"] == 1.0
    by_layer = [{f for n, f in factors.items() if f".layers.{i}." in n} for i in range(3)]
    assert by_layer == [{0.125}, {0.25}, {0.5}]
    assert factors["model.embed_tokens.weight"] == 0.0625


def test_the_loop_honours_the_factors() -> None:
    """After one step of AdamW every weight with a gradient has moved by its own rate."""
    base = base_of("llama-tied")
    delta = fresh(Full(layer_decay=0.5), base)
    one = SHORT.model_copy(update={"epochs": 0.01})
    list(train(one, base, delta, training_rows(), learning_rate=1e-2, seed=0))
    own = base.parameters()
    for name, p in delta.trainable().items():
        moved = (p - own[name]).abs()
        assert float(moved.max().detach()) == pytest.approx(1e-2 * delta.rate_factors()[name], rel=1e-2), name


# --- towards the base ---


def test_the_penalty_is_half_the_strength_times_the_squared_distance() -> None:
    base = base_of("llama-tied")
    delta = fresh(Full(l2_sp=0.3), base)
    start = delta.penalty()
    assert start is not None
    assert float(start.detach()) == 0.0
    with torch.no_grad():
        for p in delta.trainable().values():
            p += 0.01 * torch.randn_like(p)
    penalty = delta.penalty()
    assert penalty is not None
    assert float(penalty.detach()) == pytest.approx(0.15 * distance(delta, base) ** 2, rel=1e-5)
    penalty.backward()  # type: ignore[no-untyped-call]
    for name, p in delta.trainable().items():
        torch.testing.assert_close(p.grad, 0.3 * (p - base.parameters()[name]).detach())
    assert fresh(Full(), base).penalty() is None


def test_the_pull_keeps_training_near_the_base() -> None:
    base = base_of("llama-tied")
    distances = [distance(trained(Full(l2_sp=strength), base, rate=3e-3), base) for strength in (0.0, 0.1, 10.0)]
    assert distances[2] < 0.7 * distances[0]
    assert distances[2] < distances[1] < distances[0]


def test_micro_batches_take_the_penalty_once() -> None:
    base = base_of("llama-tied")
    results = []
    for tokens, accumulate in ((10**6, 1), (60, 100)):
        training = SHORT.model_copy(update={"batch_tokens": tokens, "accumulate": accumulate, "epochs": 3.0})
        delta = fresh(Full(parts=("norms",), l2_sp=5.0), base)
        list(train(training, base, delta, training_rows(), learning_rate=1e-3, seed=0))
        results.append(delta.export())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-3, atol=1e-5)


# --- bf16 ---


def test_masters_of_a_bf16_base_are_its_weights_and_move_as_far_as_they_are_moved() -> None:
    """On average: one that stands in the middle of what rounds to it moves only after half the distance of two numbers."""
    base = tiny_base("llama-tied", dtype=torch.bfloat16)
    own = {name: p.detach().clone() for name, p in base.parameters().items()}
    delta = METHOD.init(Full(), base, torch.Generator().manual_seed(1))
    assert {name: w.dtype for name, w in delta.weights().items()} == dict.fromkeys(own, torch.bfloat16)
    assert all(torch.equal(w, own[name]) for name, w in delta.weights().items())
    step, moved, n = 2e-4, 0.0, 0
    for name, master in delta.state().items():
        there = (master + step).to(torch.bfloat16).double() - own[name].double()
        moved, n = moved + float(there.sum()), n + there.numel()
    assert moved / n == pytest.approx(step, rel=0.1)


def test_masters_depend_on_the_seed_alone() -> None:
    base = tiny_base("llama-tied", dtype=torch.bfloat16)
    a, b, c = (METHOD.init(Full(), base, torch.Generator().manual_seed(seed)).state() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_zero_and_the_ends_of_bf16_stay_what_they_round_to() -> None:
    ends = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 2.0**-133, -(2.0**-126), torch.finfo(torch.bfloat16).max], dtype=torch.bfloat16
    )
    for seed in range(20):
        delta = FullDelta({"ends": ends}, torch.bfloat16)
        delta.start_somewhere_in_rounding(torch.Generator().manual_seed(seed))
        master = delta.state()["ends"]
        assert master.dtype is torch.float32
        assert torch.equal(master.to(torch.bfloat16), ends)
        assert not torch.equal(master, ends.float())


def test_the_pull_to_the_base_sees_what_bf16_does_not() -> None:
    """Its value is that of the masters, and its gradient points from them to the base."""
    base = tiny_base("llama-tied", dtype=torch.bfloat16)
    delta = METHOD.init(Full(l2_sp=2.0), base, torch.Generator().manual_seed(1))
    own = {name: p.detach().float() for name, p in base.parameters().items()}
    penalty = delta.penalty()
    assert penalty is not None
    away = {name: master.double() - own[name].double() for name, master in delta.state().items()}
    assert float(penalty.detach()) == pytest.approx(sum(float(d.square().sum()) for d in away.values()), rel=1e-3)
    penalty.backward()  # type: ignore[no-untyped-call]
    for name, p in delta.trainable().items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad.double(), 2.0 * away[name], rtol=1e-2, atol=1e-9)


def test_a_state_of_masters_in_halves_is_restored_whole() -> None:
    base = tiny_base("llama-tied", dtype=torch.bfloat16)
    one, other = (METHOD.init(Full(), base, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    other.restore({name: t.clone() for name, t in one.state().items()})
    assert all(torch.equal(t, other.state()[name]) for name, t in one.state().items())
