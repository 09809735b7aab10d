"""Given the same weights, our methods compute what their reference implementations compute: logits and gradients.

LoRA against PEFT itself; bottleneck adapters against adapter-hub's formulas written into the decoder layers by hand, since
that package needs a transformers of its own. What all comparisons share is here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MethodType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests import oracles
from tests.oracles import base_of, packed_logits, rows_of, stock_logits
from tests.parity.seen import SEEN, as_vectors
from tritune.methods import method_of
from tritune.methods.base import Delta
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.lora import LoRA
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.models.sites import FAMILIES
from tritune.spec import MethodConfig

ROWS = rows_of((7, 12, 3))
#: largest difference in float32, as a share of the largest logit, or of the largest gradient of a tensor
BOUND = 1e-4
#: the packaged base itself; every variant is compared on it and on tiny ones of at least four more families
REAL = "smollm2-135m"

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own


def moved(config: MethodConfig, base: Base) -> Delta:
    """A delta as after some training: nothing at zero."""
    delta = method_of(config).init(config, base, torch.Generator().manual_seed(0))
    return move(delta, 0.2 if base.located is None else 0.02)


def move(delta: Delta, size: float) -> Delta:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return delta.eval()


def weighted_sum(logits: Sequence[Tensor]) -> Tensor:
    """What both sides take the gradients of."""
    generator = torch.Generator().manual_seed(2)
    parts = [(t * torch.randn(t.shape, generator=generator)).sum() for t in logits]
    return torch.stack(parts).sum()


def ours(base: Base, delta: Delta) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of every row, and the gradient of their weighted sum for every trained tensor."""
    with base.bind(delta):
        logits = packed_logits(base, ROWS)
        weighted_sum(logits).backward()
    return [t.detach() for t in logits], slopes(delta.trainable())


def slopes(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of each; all must have one."""
    found = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def theirs(forward: Callable[[Sequence[int]], Tensor]) -> list[Tensor]:
    """The same by another model, each row alone; gradients are left on its parameters."""
    logits = [forward(row) for row in ROWS]
    weighted_sum(logits).backward()
    return [t.detach() for t in logits]


def assert_close(got: Sequence[Tensor], wanted: Sequence[Tensor], bare: Sequence[Tensor]) -> None:
    gap = SEEN.note(got, wanted)
    SEEN.note_variant(logits=gap)
    assert gap < BOUND
    for a, b, c in zip(got, wanted, bare, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=max(2e-5, 1e-5 * float(b.abs().max())))
        assert not torch.allclose(a, c, atol=1e-2), "what was added makes no difference"


def assert_gradients_close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    got, wanted = as_vectors(got), as_vectors(wanted)
    for name, gradient in got.items():
        assert float(wanted[name].abs().max()) > 1e-4, name
        gap = SEEN.note([gradient], [wanted[name]])
        SEEN.note_variant(gradients=gap)
        assert gap < BOUND, name


@cache
@torch.no_grad()
def bare(name: str) -> list[Tensor]:
    return [stock_logits(oracles.stock_of(name), row) for row in ROWS]


def assert_given_ours_it_agrees(
    name: str,
    delta: Delta,
    pairs: Mapping[str, Tensor],
    answers: Callable[[], list[Tensor]],
    as_theirs: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> None:
    """With our numbers in its parameters, another package has our logits and gradients.

    Args:
        pairs: its parameters, by our names.
        answers: its logits of every row; it leaves gradients of their weighted sum behind.
        as_theirs: our tensors in the shapes that it keeps them in.
    """
    with torch.no_grad():
        for tensor_name, parameter in as_theirs(delta.trainable()).items():
            pairs[tensor_name].copy_(parameter)
    wanted = answers()
    got, gradients = ours(base_of(name), delta)
    assert_close(got, wanted, bare(name))
    assert_gradients_close(as_theirs(gradients), {n: p.grad for n, p in pairs.items() if p.grad is not None})


# --- LoRA ---

LORAS = {
    "plain": LoRA(rank=4, alpha=4.0),
    "alpha is not r": LoRA(rank=3, alpha=16.0),
    "rank-stabilised": LoRA(rank=4, alpha=6.0, rank_stabilised=True),
    "some modules": LoRA(rank=2, alpha=3.0, roles=(Role.ATTN_V, Role.MLP_DOWN)),
    "dropout, not training": LoRA(rank=2, alpha=3.0, dropout=0.5),
}


def peft_lora(model: PreTrainedModel, config: LoRA, modules: list[str], times: int = 1) -> Any:
    """`times`: that many of our low-rank terms beside each other in one of PEFT's, at the same scale."""
    given = peft.LoraConfig(
        r=config.rank * times,
        lora_alpha=config.scale * config.rank * times if not config.rank_stabilised else config.alpha * times**0.5,
        use_rslora=config.rank_stabilised,
        lora_dropout=config.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, given).eval()


def run_peft(model: Any) -> list[Tensor]:
    return theirs(lambda row: model(input_ids=torch.tensor([list(row)])).logits[0])


@pytest.mark.parametrize("case", LORAS)
@pytest.mark.parametrize("name", [REAL, "llama-tied", "qwen3", "gemma2", "mistral", "opt-post-norm"])
def test_lora_is_pefts_lora(name: str, case: str) -> None:
    base, config = base_of(name), LORAS[case]
    SEEN.comparing("lora", case, base)
    delta = moved(config, base)
    linear = FAMILIES[base.config.model_type](base.config).linear
    paths = {
        site.key: f"{FAMILIES[base.config.model_type](base.config).layers}.{site.layer}.{linear[site.role]}"
        for site in delta.sites()
    }
    model = peft_lora(oracles.stock(base), config, sorted({path.rpartition(".")[2] for path in paths.values()}))
    tensors = {}
    for key, path in paths.items():
        module = model.base_model.model.get_submodule(path)
        for part, layer in (("A", module.lora_A), ("B", module.lora_B)):
            tensors[f"{key}.{part}"] = layer["default"].weight
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == len(tensors), "PEFT adapts exactly the same places"
    assert_given_ours_it_agrees(name, delta, tensors, lambda: run_peft(model))


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize(
    ("name", "fused", "roles"),
    [
        ("gpt2", "c_attn", (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)),
        ("phi3", "qkv_proj", (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)),
        ("phi3", "gate_up_proj", (Role.MLP_GATE, Role.MLP_UP)),
    ],
)
def test_lora_on_a_fused_matrix_is_pefts_with_block_diagonal_b(
    name: str, fused: str, roles: tuple[Role, ...], stabilised: bool
) -> None:
    """PEFT has one term for the whole matrix: ours stacked in A, and side by side in B, are the same function."""
    base = base_of(name)
    config = LoRA(rank=3, alpha=5.0, rank_stabilised=stabilised, roles=roles)
    SEEN.comparing("lora", "on a fused matrix", base)
    delta = moved(config, base)
    model = peft_lora(oracles.stock(base), config, [fused], times=len(roles))
    modules = {n: m for n, m in model.named_modules() if n.endswith(f".{fused}")}
    assert len(modules) == 3
    exported = delta.export()
    for layer, module in enumerate(modules.values()):
        keys = [f"layers.{layer}.{role}" for role in roles]
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.cat([exported[f"{k}.A"] for k in keys]))
            module.lora_B["default"].weight.copy_(torch.block_diag(*(exported[f"{k}.B"] for k in keys)))
    wanted = run_peft(model)
    got, gradients = ours(base, delta)
    assert_close(got, wanted, bare(name))
    found = {}
    for layer, module in enumerate(modules.values()):
        keys = [f"layers.{layer}.{role}" for role in roles]
        at = 0
        for i, key in enumerate(keys):
            rank = slice(3 * i, 3 * i + 3)
            width = exported[f"{key}.B"].shape[0]
            found[f"{key}.A"] = module.lora_A["default"].weight.grad[rank]
            found[f"{key}.B"] = module.lora_B["default"].weight.grad[at : at + width, rank]
            at += width
    assert_gradients_close(gradients, found)


@pytest.mark.parametrize("roles", [(Role.ATTN_O,), (Role.MLP_UP, Role.MLP_DOWN)], ids=["output", "feed-forward"])
def test_lora_on_gpt2s_transposed_matrices(roles: tuple[Role, ...]) -> None:
    base = base_of("gpt2")
    config = LoRA(rank=3, alpha=5.0, roles=roles)
    SEEN.comparing("lora", "on a transposed matrix", base)
    delta = moved(config, base)
    linear = FAMILIES["gpt2"](base.config).linear
    stock = oracles.stock(base)
    targets = [f"transformer.h.{site.layer}.{linear[site.role]}" for site in delta.sites()]
    model = peft_lora(stock, config, targets)
    tensors = {}
    for site, path in zip(delta.sites(), targets, strict=True):
        module = model.base_model.model.get_submodule(path)
        tensors |= {f"{site.key}.A": module.lora_A["default"].weight, f"{site.key}.B": module.lora_B["default"].weight}
    with torch.no_grad():
        for tensor_name, tensor in tensors.items():
            tensor.copy_(delta.export()[tensor_name])
    wanted = run_peft(model)
    got, gradients = ours(base, delta)
    assert_close(got, wanted, bare("gpt2"))
    assert_gradients_close(gradients, {n: t.grad for n, t in tensors.items()})


def test_lora_starts_as_pefts_does() -> None:
    """B at zero, A uniform within one over the root of the input width."""
    base = base_of("llama")
    delta = method_of(LoRA()).init(LoRA(rank=64), base, torch.Generator().manual_seed(0))
    model = peft_lora(oracles.stock(base), LoRA(rank=64), ["q_proj", "down_proj"])
    for role, module in ((Role.ATTN_Q, "self_attn.q_proj"), (Role.MLP_DOWN, "mlp.down_proj")):
        mine = delta.export()[f"layers.0.{role}.A"]
        their = model.base_model.model.get_submodule(f"model.layers.0.{module}").lora_A["default"].weight.detach()
        bound = mine.shape[1] ** -0.5
        for a in (mine, their):
            assert float(a.abs().max()) <= bound
            assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not delta.export()[f"layers.0.{role}.B"].any()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_merged_weights_are_pefts_merged_weights(name: str) -> None:
    base = base_of(name)
    config = LoRA(rank=3, alpha=5.0, roles=(Role.ATTN_O, Role.MLP_DOWN))
    delta = moved(config, base)
    family = FAMILIES[base.config.model_type](base.config)
    targets = [f"{family.layers}.{site.layer}.{family.linear[site.role]}" for site in delta.sites()]
    model = peft_lora(oracles.stock(base), config, targets)
    with torch.no_grad():
        for site, path in zip(delta.sites(), targets, strict=True):
            module = model.base_model.model.get_submodule(path)
            module.lora_A["default"].weight.copy_(delta.export()[f"{site.key}.A"])
            module.lora_B["default"].weight.copy_(delta.export()[f"{site.key}.B"])
    merged = dict(model.merge_and_unload().named_parameters())
    mine = method_of(config).merge(delta, base)
    assert set(mine) == {f"{path}.weight" for path in targets}
    for weight_name, weight in mine.items():
        torch.testing.assert_close(weight, merged[weight_name].detach(), rtol=1e-5, atol=1e-6)
        assert weight.is_contiguous()


# --- bottleneck adapters, by adapter-hub's formulas ---

BOTTLENECKS = {
    "seq_bn": Bottleneck(placement="seq", reduction_factor=8.0, nonlinearity="relu", init="bert"),
    "double_seq_bn": Bottleneck(placement="double_seq", reduction_factor=8.0, nonlinearity="swish", init="bert"),
    "par_bn": Bottleneck(placement="par", reduction_factor=2.0, nonlinearity="relu", scaling=4.0),
    "scaled par_bn": Bottleneck(placement="par", reduction_factor=2.0, nonlinearity="relu", scaling="learned"),
    "seq_bn with gelu": Bottleneck(placement="seq", reduction_factor=4.0, nonlinearity="gelu", scaling=0.5),
    "double_seq_bn with tanh": Bottleneck(placement="double_seq", reduction_factor=4.0, nonlinearity="tanh"),
}

Adapter = Callable[[str, Tensor], Tensor]


def with_adapters(model: PreTrainedModel, layers: nn.ModuleList, name: str, placement: str, adapter: Adapter) -> None:
    """Write the decoder layers out again, with the adapters where adapter-hub puts them."""
    norms = ("ln_1", "ln_2") if name == "gpt2" else ("input_layernorm", "post_attention_layernorm")
    attention = "attn" if name == "gpt2" else "self_attn"

    def make(index: int, layer: Any) -> Callable[..., Tensor]:
        def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = hidden_states
            h = getattr(layer, attention)(getattr(layer, norms[0])(x), *args, **kwargs)[0]
            added = adapter(f"layers.{index}.block.attn", h) if placement == "double_seq" else 0
            x = x + h + added
            h = layer.mlp(getattr(layer, norms[1])(x))
            u = {"seq": x + h, "double_seq": h, "par": x}[placement]
            return x + h + adapter(f"layers.{index}.block.mlp", u)

        return forward

    for index, layer in enumerate(layers):
        layer.forward = MethodType(make(index, layer), layer)


@pytest.mark.parametrize("case", BOTTLENECKS)
@pytest.mark.parametrize("name", ["llama-tied", "mistral", "gpt2"])
def test_bottleneck_is_adapter_hubs_formula(name: str, case: str) -> None:
    base, config = base_of(name), BOTTLENECKS[case]
    SEEN.comparing("bottleneck", case, base, "formula")
    delta = moved(config, base)
    leaves = {n: t.clone().requires_grad_(True) for n, t in delta.export().items()}

    def adapter(key: str, u: Tensor) -> Tensor:
        parts = {n.removeprefix(f"{key}."): t for n, t in leaves.items() if n.startswith(f"{key}.")}
        scaling = parts["scaling"] if config.scaling == "learned" else config.scaling
        return oracles.bottleneck(u, parts, config.nonlinearity, scaling)

    model = oracles.stock(base)
    layers = model.get_submodule(FAMILIES[base.config.model_type](base.config).layers)
    assert isinstance(layers, nn.ModuleList)
    with_adapters(model, layers, name, config.placement, adapter)
    wanted = theirs(lambda row: stock_logits(model, row))
    got, gradients = ours(base, delta)
    assert_close(got, wanted, bare(name))
    assert_gradients_close(gradients, {n: t.grad for n, t in leaves.items() if t.grad is not None})


@pytest.mark.parametrize(
    ("case", "width", "count"),
    [
        ("seq_bn", 4, 3 * (2 * 32 * 4 + 4 + 32)),
        ("double_seq_bn", 4, 6 * (2 * 32 * 4 + 4 + 32)),
        ("par_bn", 16, 3 * (2 * 32 * 16 + 16 + 32)),
        ("scaled par_bn", 16, 3 * (2 * 32 * 16 + 16 + 32 + 1)),
    ],
)
def test_bottlenecks_have_adapter_hubs_sizes(case: str, width: int, count: int) -> None:
    """blocks x layers x (2 d b + b + d), one more per block where the scaling is learned."""
    base, config = base_of("llama"), BOTTLENECKS[case]
    delta = method_of(config).init(config, base, torch.Generator())
    assert {config.width(site) for site in delta.sites()} == {width}
    assert sum(p.numel() for p in delta.trainable().values()) == count
