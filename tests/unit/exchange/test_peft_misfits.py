"""PEFT's folders in which something does not fit: everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of
from tests.unit.exchange.conftest import adapted
from tests.unit.exchange.peft_side import PEFT, change, refused
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
Q2 = "base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"
NORM = "base_model.model.model.norm.lora_A.weight"
M1 = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"


def spoil(tensors: dict[str, Tensor]) -> None:
    del tensors[Q0]
    tensors[Q1] = torch.zeros(5, 5)
    tensors[Q2][0, 0] = float("inf")
    tensors[NORM] = torch.zeros(3, 32)
    tensors[M1] = torch.zeros(32)


def test_one_error_names_everything(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    PEFT.write(adapted(base, LoRA(rank=3, roles=(Role.ATTN_Q,))), tmp_path)
    settings = {
        "lora_bias": True,
        "bias": "lora_only",
        "modules_to_save": ["lm_head"],
        "init_lora_weights": "pissa_niter_4",
        "setting_of_tomorrow": 3,
        "another_of_tomorrow": None,
        "task_type": "SEQ_CLS",
        "target_modules": ["self_attn.q_proj", "model.norm"],
    }
    change(tmp_path, settings, spoil)
    found = refused(tmp_path, base)
    keys = set(settings) - {"another_of_tomorrow", "target_modules"}
    assert set(found) == {f"config key '{key}'" for key in keys} | {Q0, Q1, Q2, M1, NORM, "module 'model.norm'"}
    assert found[Q0] == "missing"
    assert "(5, 5)" in found[Q1]
    assert "not finite" in found[Q2]


def test_numbers_that_are_none(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    PEFT.write(adapted(base, LoRA(rank=3, roles=(Role.ATTN_Q,))), tmp_path)
    settings = {"r": "3", "lora_alpha": 0, "rank_pattern": {"q_proj": 1.5}, "alpha_pattern": {"(": 2}}
    change(tmp_path, settings, lambda tensors: None)
    assert set(refused(tmp_path, base)) == {f"config key '{key}'" for key in settings}


def test_another_rank_than_the_config_says(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    PEFT.write(adapted(base, LoRA(rank=3, roles=(Role.ATTN_Q,))), tmp_path)
    change(tmp_path, {"r": 4}, lambda tensors: None)
    found = refused(tmp_path, base)
    assert len(found) == 6
    assert "expected (4, 32)" in found[Q0]


def test_a_base_of_another_size(tmp_path: Path) -> None:
    """The wrong base by its shapes alone: no note of ours beside the files."""
    PEFT.write(adapted(base_of("llama-tied"), PTuning(tokens=3, encoder="none")), tmp_path)
    found = refused(tmp_path, base_of("opt-post-norm"))
    assert set(found) == {"config key 'token_dim'", "prompt_embeddings"}


def test_prompts_that_do_not_fit(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    PEFT.write(adapted(base, PTuning(tokens=3, encoder="none")), tmp_path)
    settings = {"num_virtual_tokens": 4, "num_transformer_submodules": 2, "modules_to_save": ["lm_head"], "new": 1}
    change(tmp_path, settings, lambda tensors: tensors.update(more=torch.zeros(1)))
    assert set(refused(tmp_path, base)) == {
        "config key 'num_transformer_submodules'",
        "config key 'modules_to_save'",
        "config key 'new'",
        "prompt_embeddings",
        "more",
    }


@pytest.mark.parametrize("kind", ["VERA", None, 3])
def test_a_type_nobody_knows(kind: object, tmp_path: Path) -> None:
    base = base_of("llama-tied")
    PEFT.write(adapted(base, LoRA(rank=3)), tmp_path)
    change(tmp_path, {"peft_type": kind}, lambda tensors: None)
    assert set(refused(tmp_path, base)) == {"peft_type"}


def test_an_adaptation_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    PEFT.write(adapted(base, LoRA(rank=3)), tmp_path)
    change(tmp_path, {"target_modules": ["query"]}, lambda tensors: tensors.clear())
    assert "matches no module" in refused(tmp_path, base)["config key 'target_modules'"]


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    base = base_of("gpt2")
    PEFT.write(adapted(base, IA3()), tmp_path)
    fused = "transformer.h.0.attn.c_attn"
    settings = {"feedforward_modules": ["c_attn"], "target_modules": ["attn.c_attn", "lm_head"], "new": 1}
    change(tmp_path, settings, lambda tensors: None)
    found = refused(tmp_path, base)
    assert {f"module '{fused}'", "module 'lm_head'", "config key 'new'", f"base_model.model.{fused}.ia3_l"} <= set(
        found
    )
    assert "no place" in found["base_model.model.transformer.h.0.mlp.c_proj.ia3_l"]
    change(tmp_path, {"feedforward_modules": "("}, lambda tensors: None)
    assert "config key 'feedforward_modules'" in refused(tmp_path, base)


def test_a_prefix_of_another_base(tmp_path: Path) -> None:
    PEFT.write(adapted(base_of("llama-tied"), Prefix(tokens=3)), tmp_path)
    change(tmp_path, {"num_layers": 5, "num_transformer_submodules": 2}, lambda tensors: None)
    wrong = {"config key 'num_layers'", "config key 'num_transformer_submodules'", "prompt_embeddings"}
    assert set(refused(tmp_path, base_of("gpt2"))) == wrong
