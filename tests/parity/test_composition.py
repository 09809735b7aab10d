"""Adaptations put together against PEFT: LoRAs merged as its `add_weighted_adapter` merges them, by their logits and by what
is added to each matrix; and parts of several kinds at once: PEFT's LoRAs, with prompts and scales written beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.oracles import base_of, packed_logits
from tests.parity.seen import SEEN
from tests.parity.test_lora_starts import paths_of
from tests.parity.test_peft import (
    REAL,
    ROWS,
    assert_close,
    assert_gradients_close,
    bare,
    moved,
    slopes,
    theirs,
    weighted_sum,
)
from tests.parity.test_prompts import answered, written_out
from tests.unit.exchange.conftest import adapted
from tritune.adaptation import Adaptation
from tritune.composition.merging import How, merge
from tritune.methods.base import Delta
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.methods.stack import Stack, StackDelta, of_part
from tritune.models.base import Role
from tritune.models.pretrained import Base

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

#: bases in which every role has a matrix of its own
BASES = (REAL, "llama-tied", "qwen3", "gemma2", "mistral", "opt-post-norm")
#: of small matrices, as every one is decomposed
ONE = LoRA(rank=3, alpha=6.0, roles=(Role.ATTN_K, Role.ATTN_V))
OTHER = LoRA(rank=2, alpha=1.0, roles=(Role.ATTN_K, Role.ATTN_V))


def with_loras(base: Base, parts: Sequence[tuple[LoRA, Delta]]) -> tuple[Any, list[dict[str, Tensor]]]:
    """PEFT's model with adapters "0", "1", ... that have our weights; and the parameters of each by our names."""
    model: Any = oracles.stock(base)
    found = []
    for i, (config, delta) in enumerate(parts):
        paths = paths_of(base, delta)
        given = peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules=list(paths.values()), task_type="CAUSAL_LM"
        )  # type: ignore[arg-type]
        if i:
            model.add_adapter(str(i), given)
        else:
            model = peft.get_peft_model(model, given, "0")
        tensors = {}
        for key, path in paths.items():
            module = model.base_model.model.get_submodule(path)
            tensors |= {f"{key}.A": module.lora_A[str(i)].weight, f"{key}.B": module.lora_B[str(i)].weight}
        with torch.no_grad():
            for name, tensor in delta.export().items():
                tensors[name].copy_(tensor)
        found.append(tensors)
    return model.eval(), found


# --- merged into one ---

#: PEFT's name of each way, and the share that is kept
WAYS: Mapping[How, tuple[str, float | None]] = {
    "linear": ("cat", None),
    "svd": ("svd", None),
    "ties": ("ties_svd", 0.3),
    "dare_linear": ("dare_linear_svd", 0.6),
    "dare_ties": ("dare_ties_svd", 0.6),
}


def part(base: Base, config: LoRA, seed: int) -> Adaptation:
    found = adapted(base, config)
    order, size = torch.Generator().manual_seed(seed), 0.1 if base.located is None else 0.02
    tensors = {n: t + size * torch.randn(t.shape, generator=order) for n, t in found.delta.export().items()}
    return Adaptation(base, found.task, config, tensors, found.origin)


def draw_alike(patch: pytest.MonkeyPatch, parts: int) -> None:
    """Both sides drop the same numbers of the same part: those below their density in a pattern by part and shape."""
    turns = cycle(range(parts))

    def pattern(i: int, shape: Sequence[int]) -> Tensor:
        return torch.empty(tuple(shape), dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(i))

    patch.setattr(torch, "rand", lambda shape, **_: torch.stack([pattern(i, shape[1:]) for i in range(shape[0])]))
    patch.setattr(torch, "bernoulli", lambda p: (pattern(next(turns), p.shape) < p.double()).to(p))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_merged_loras_are_pefts(name: str, how: How, monkeypatch: pytest.MonkeyPatch) -> None:
    base, (their, density) = base_of(name), WAYS[how]
    SEEN.comparing("merge", how, base)
    parts, weights = [part(base, ONE, 0), part(base, OTHER, 1)], [0.7, 0.4]
    model, _ = with_loras(base, [(ONE, parts[0].delta), (OTHER, parts[1].delta)])
    with monkeypatch.context() as patch:
        draw_alike(patch, len(parts))
        merged = merge(parts, how, weights=weights, density=density).adaptation
        model.add_weighted_adapter(["0", "1"], weights, "merged", their, density=density)
    model.set_adapter("merged")
    with base.bind(merged.delta):
        got = packed_logits(base, ROWS)
    assert_close(got, [model(input_ids=torch.tensor([row])).logits[0] for row in ROWS], bare(name))
    paths = paths_of(base, parts[0].delta)
    for site in merged.delta.sites():
        term = merged.delta.low_rank(site)
        assert term is not None
        wanted = model.base_model.model.get_submodule(paths.pop(site.key)).get_delta_weight("merged")
        change = term.scale * term.B_Er @ term.A_rD
        torch.testing.assert_close(change, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    assert not paths


# --- at once ---

TOGETHER = {
    "a prompt and a LoRA": (PTuning(tokens=4, encoder="none"), ONE),
    "a LoRA and a prompt behind the text": (ONE, PTuning(tokens=3, encoder="none", placement="suffix")),
    "two LoRAs": (ONE, OTHER),
    "a LoRA and scales upon it": (ONE, IA3()),
}


def scale(model: Any, paths: Mapping[str, str], scales: Mapping[str, Tensor]) -> None:
    """Let every named module's input or output be multiplied."""

    def entering(scale_D: Tensor) -> Callable[..., Any]:
        return lambda _, args: (args[0] * scale_D, *args[1:])

    def leaving(scale_E: Tensor) -> Callable[..., Any]:
        return lambda _, __, y: y * scale_E

    for name, tensor in scales.items():
        key, _, side = name.rpartition(".")
        module = model.base_model.model.get_submodule(paths[key])
        if side == "in":
            module.register_forward_pre_hook(entering(tensor))
        else:
            module.register_forward_hook(leaving(tensor))


@pytest.mark.parametrize("case", TOGETHER)
@pytest.mark.parametrize("name", BASES)
def test_parts_of_several_kinds_answer_together(name: str, case: str) -> None:
    base, configs = base_of(name), TOGETHER[case]
    SEEN.comparing("stack", case, base)
    delta = moved(Stack.of(configs), base)
    assert isinstance(delta, StackDelta)
    parts = list(zip(configs, delta.members, strict=True))
    model, tensors = with_loras(base, [(c, d) for c, d in parts if isinstance(c, LoRA)])
    model.base_model.set_adapter([str(i) for i in range(len(tensors))])
    beside: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    of_loras = iter(tensors)
    for i, (config, its) in enumerate(parts):
        if isinstance(config, LoRA):
            leaves |= of_part(i, next(of_loras))
            continue
        own = {n: p.detach().clone().requires_grad_(True) for n, p in its.trainable().items()}
        leaves |= of_part(i, own)
        if isinstance(config, PTuning):
            beside["front_PD" if config.placement == "prefix" else "behind_PD"] = own["table"]
        else:
            scale(model, paths_of(base, its), own)
    wanted = theirs(lambda row: written_out(model, row, **beside))
    got = answered(base, delta)
    weighted_sum(got).backward()
    with torch.no_grad():
        assert_close(got, wanted, [written_out(oracles.stock_of(name), row) for row in ROWS])
    assert_gradients_close(
        slopes(delta.trainable()),
        slopes(leaves),
    )
