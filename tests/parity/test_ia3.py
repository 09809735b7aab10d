"""(IA)^3 against PEFT's: the same scales give the same logits, gradients and merged weights, fused matrices included."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.oracles import base_of
from tests.parity.seen import SEEN
from tests.parity.test_peft import REAL, assert_close, assert_gradients_close, bare, moved, ours, run_peft
from tritune.errors import Mismatch
from tritune.methods import method_of
from tritune.methods.base import Delta
from tritune.methods.ia3 import IA3
from tritune.models.base import Role, Site
from tritune.models.pretrained import Base
from tritune.models.sites import FAMILIES

QKV = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own


def peft_ia3(base: Base, delta: Delta, config: IA3) -> tuple[Any, dict[str, tuple[Tensor, Tensor]]]:
    """PEFT's model with our scales in it; and for each of our tensors PEFT's parameter and which of its entries it is."""
    family = FAMILIES[base.config.model_type](base.config)
    paths = {site.key: f"{family.layers}.{site.layer}.{family.linear[site.role]}" for site in delta.sites()}
    entering = {paths[site.key] for site in delta.sites() if site.role in config.input_roles}
    given = peft.IA3Config(
        target_modules=sorted(set(paths.values())), feedforward_modules=sorted(entering), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(oracles.stock(base), given).eval()
    pairs = {}
    for site in delta.sites():
        part = "in" if site.role in config.input_roles else "out"
        theirs = model.base_model.model.get_submodule(paths[site.key]).ia3_l["default"]
        pairs[f"{site.key}.{part}"] = (theirs, entries(base, site, theirs))
    with torch.no_grad():
        for name, tensor in delta.export().items():
            theirs, index = pairs[name]
            theirs.view(-1)[index] = tensor
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p, _ in pairs.values()}, "PEFT scales exactly the same places"
    return model, pairs


def entries(base: Base, site: Site, theirs: Tensor) -> Tensor:
    columns = base.weight_of(site)[1].columns
    return torch.arange(theirs.numel()) if columns is None else columns


CASES = {
    "the paper's": IA3(),
    "all of attention": IA3(output_roles=QKV, input_roles=(Role.MLP_DOWN,)),
    "no input side": IA3(output_roles=(Role.ATTN_O, Role.MLP_UP), input_roles=()),
    "input side only": IA3(output_roles=(), input_roles=(Role.ATTN_O, Role.MLP_DOWN)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [REAL, "llama-tied", "gemma2", "opt", "opt-post-norm", "gpt2", "gpt-neox", "phi3"])
def test_ia3_is_pefts_ia3(name: str, case: str) -> None:
    """Where q, k and v are one matrix PEFT has one scale for all of it: ours are its parts, and the rest stays at one."""
    base, config = base_of(name), CASES[case]
    SEEN.comparing("ia3", case, base)
    if name == "phi3" and case == "no input side":
        config = IA3(output_roles=(Role.ATTN_O, Role.MLP_GATE, Role.MLP_UP), input_roles=())
    delta = moved(config, base)
    model, pairs = peft_ia3(base, delta, config)
    wanted = run_peft(model)
    got, gradients = ours(base, delta)
    assert_close(got, wanted, bare(name))
    found = {}
    for tensor_name, (theirs, index) in pairs.items():
        assert theirs.grad is not None
        found[tensor_name] = theirs.grad.view(-1)[index]
    assert_gradients_close(gradients, found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gpt-neox", "phi3"])
def test_merged_weights_are_pefts_merged_weights(name: str) -> None:
    base, config = base_of(name), CASES["all of attention"]
    delta = moved(config, base)
    model, _ = peft_ia3(base, delta, config)
    merged = dict(model.merge_and_unload().named_parameters())
    mine = method_of(config).merge(delta, base)
    changed = {n for n, p in base.parameters().items() if not torch.equal(p, merged[n])}
    assert set(mine) == changed, "biases of outputs that are scaled, and no others"
    for weight_name, weight in mine.items():
        torch.testing.assert_close(weight, merged[weight_name].detach(), rtol=1e-5, atol=1e-6)
        assert weight.is_contiguous()


PEFTS_DEFAULTS = {
    "llama": (Role.ATTN_K, Role.ATTN_V),
    "mistral": (Role.ATTN_K, Role.ATTN_V),
    "qwen2": (Role.ATTN_Q, Role.ATTN_V),
    "qwen3": (Role.ATTN_Q, Role.ATTN_V),
    "gemma2": (Role.ATTN_Q, Role.ATTN_V),
    "gemma3": (Role.ATTN_Q, Role.ATTN_V),
    "opt": (Role.ATTN_Q, Role.ATTN_K),
    "gpt2": QKV,
    "gpt-neox": QKV,
}


@pytest.mark.parametrize("name", PEFTS_DEFAULTS)
def test_what_peft_scales_by_default_can_be_named(name: str) -> None:
    """It departs from the paper's keys and values in most families; ours is the paper's everywhere."""
    base = base_of(name)
    model = peft.get_peft_model(oracles.stock(base), peft.IA3Config(task_type="CAUSAL_LM"))
    theirs = {
        n.removeprefix("base_model.model.").partition(".ia3_l")[0] for n, _ in model.named_parameters() if "ia3" in n
    }
    config = IA3(output_roles=PEFTS_DEFAULTS[name])
    family = FAMILIES[base.config.model_type](base.config)
    assert {f"{family.layers}.{s.layer}.{family.linear[s.role]}" for s in config.sites(base)} == theirs
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert method_of(config).budget(config, base).trained == numbers


@pytest.mark.parametrize(("name", "role"), [("gpt2", Role.ATTN_V), ("phi3", Role.MLP_UP), ("gpt-neox", Role.ATTN_Q)])
def test_an_input_that_others_share_is_refused(name: str, role: Role) -> None:
    config = IA3(output_roles=(), input_roles=(role,))
    with pytest.raises(Mismatch, match=f"'{role}': shares its matrix"):
        method_of(config).init(config, base_of(name), torch.Generator())


def test_what_is_no_linear_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block\.mlp: only"):
        IA3(output_roles=(Role.BLOCK_MLP,))
    with pytest.raises(ValueError, match="nothing would be learned"):
        IA3(output_roles=(), input_roles=())
