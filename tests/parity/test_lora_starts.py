"""PiSSA, OLoRA and ranks per role against PEFT: PEFT changes the base, we do not, and the function is the same."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.oracles import base_of
from tests.parity.seen import SEEN
from tests.parity.test_peft import REAL, assert_close, assert_given_ours_it_agrees, bare, move, ours, run_peft
from tritune.errors import Mismatch
from tritune.methods.base import Delta
from tritune.methods.lora import METHOD, LoRA
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.models.sites import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

ROLES = (Role.ATTN_O, Role.MLP_UP, Role.MLP_DOWN)
#: of the real base only the smallest matrices: a decomposition of each of its layers takes its time
SMALL = (Role.ATTN_K,)
#: tiny bases whose weights PEFT decomposes as they act
STARTED = ("llama-tied", "gemma2", "qwen3", "mistral", "opt-post-norm")


def paths_of(base: Base, delta: Delta) -> dict[str, str]:
    family = FAMILIES[base.config.model_type](base.config)
    return {s.key: f"{family.layers}.{s.layer}.{family.linear[s.role]}" for s in delta.sites()}


def peft_lora(base: Base, delta: Delta, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's model, and its parameters by our names."""
    paths = paths_of(base, delta)
    given = peft.LoraConfig(target_modules=list(paths.values()), task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(oracles.stock(base), given).eval()
    tensors = {}
    for key, path in paths.items():
        module = model.base_model.model.get_submodule(path)
        tensors |= {f"{key}.A": module.lora_A["default"].weight, f"{key}.B": module.lora_B["default"].weight}
    return model, tensors


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize(
    ("name", "start"),
    [
        # not olora: PEFT 0.21 decomposes GPT-2's matrices as they are stored, transposed, and does not start at the base
        ("gpt2", "pissa"),
        *((name, start) for name in (REAL, *STARTED) for start in ("pissa", "olora")),
    ],
)
def test_a_start_from_the_weights_is_pefts(name: str, stabilised: bool, start: Any) -> None:
    base = base_of(name)
    roles = SMALL if name == REAL else ROLES
    config = LoRA(rank=3, alpha=2.0, roles=roles, start=start, rank_stabilised=stabilised)
    SEEN.comparing("lora", f"{start}{', rank-stabilised' if stabilised else ''}", base)
    delta = METHOD.init(config, base, torch.Generator()).eval()
    options = {"r": 3, "lora_alpha": 2.0, "use_rslora": stabilised, "init_lora_weights": start}
    model, theirs = peft_lora(base, delta, **options)
    mine = delta.trainable()
    for site in delta.sites():  # a singular vector may have either sign; the product says what was taken out
        a, b = (t[f"{site.key}.B"] @ t[f"{site.key}.A"] for t in (mine, theirs))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    move(delta, 0.1 if name != REAL else 0.02)
    assert_given_ours_it_agrees(name, delta, theirs, lambda: run_peft(model))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_exported_it_is_plain_lora_of_twice_the_rank(start: Any) -> None:
    """So PEFT converts its own: its plain LoRA on the untouched base answers the same from our export."""
    base = base_of("llama-tied")
    config = LoRA(rank=2, alpha=3.0, roles=ROLES, start=start)
    delta = METHOD.init(config, base, torch.Generator()).eval()
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += 0.1
    model, theirs = peft_lora(base, delta, r=4, lora_alpha=6.0)
    with torch.no_grad():
        for tensor_name, tensor in delta.export().items():
            theirs[tensor_name].copy_(tensor)
    wanted = run_peft(model)
    got, _ = ours(base, delta)
    assert_close(got, wanted, bare("llama-tied"))


@pytest.mark.parametrize("name", [REAL, "llama-tied", "gemma2", "qwen3", "gpt2", "opt-post-norm"])
def test_ranks_and_alphas_by_role_are_pefts_patterns(name: str) -> None:
    base = base_of(name)
    config = LoRA(rank=2, alpha=3.0, roles=ROLES, ranks={Role.MLP_UP: 5}, alphas={Role.MLP_UP: 1.0, Role.ATTN_O: 8.0})
    SEEN.comparing("lora", "ranks and weights by role", base)
    delta = move(METHOD.init(config, base, torch.Generator().manual_seed(0)), 0.2 if name != REAL else 0.02)
    linear = FAMILIES[base.config.model_type](base.config).linear
    patterns = {
        "rank_pattern": {linear[Role.MLP_UP]: 5},
        "alpha_pattern": {linear[Role.MLP_UP]: 1.0, linear[Role.ATTN_O]: 8.0},
    }
    model, theirs = peft_lora(base, delta, r=2, lora_alpha=3.0, **patterns)
    assert_given_ours_it_agrees(name, delta, theirs, lambda: run_peft(model))


def test_what_cannot_be_set_up_is_listed_at_once() -> None:
    config = LoRA(
        rank=20, roles=(Role.ATTN_K, Role.ATTN_O), ranks={Role.MLP_UP: 2}, alphas={Role.BLOCK_MLP: 2.0}, start="olora"
    )
    with pytest.raises(Mismatch) as caught:
        METHOD.init(config, base_of("llama"), torch.Generator())
    assert [p.where for p in caught.value.problems] == [
        "ranks, role 'mlp.up'", "alphas, role 'block.mlp'", "rank of 'attn.k'",
    ]  # fmt: skip


def test_a_role_may_not_have_rank_0() -> None:
    with pytest.raises(Mismatch, match="ranks"):
        LoRA.read({"ranks": {"attn.q": 0}}, "here")
