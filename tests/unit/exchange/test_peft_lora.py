"""LoRAs that PEFT wrote: we answer as it does, and write the same bytes where ours has that form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.oracles import base_of
from tests.unit.exchange.conftest import adapted, assert_equal_answers, assert_same_tensors, incoming, ours
from tests.unit.exchange.peft_side import LORA, PEFT, change, loaded_by_peft, made_by_peft, refused, theirs
from tritune.exchange.peft import CONFIG, TENSORS
from tritune.methods.lora import LoRA
from tritune.models.base import Role

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

THEIRS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama-tied", {"target_modules": ["q_proj", "v_proj"]}),
    "rank-stabilised, dropout": ("qwen3", {"target_modules": ["o_proj"], "use_rslora": True, "lora_dropout": 0.5}),
    "a pattern": ("gemma2", {"target_modules": r".*\.(gate|up)_proj"}),
    "all linear": ("mistral", {"target_modules": "all-linear"}),
    "ending in a fused module": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "fused and others": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "interleaved": ("gpt-neox", {"target_modules": ["query_key_value", "dense_4h_to_h"], "use_rslora": True}),
    "two fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "ranks by module": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2}}),
    "weights by module": ("mistral", {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {"k_proj": 11}}),
    "dora": ("qwen2", {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True}),
    "dora, all linear": ("opt", {"target_modules": "all-linear", "use_dora": True}),
    "dora, fused": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "dora, interleaved": ("gpt-neox", {"target_modules": ["query_key_value", "dense"], "use_dora": True}),
    "an embedding": ("gemma3", {"target_modules": ["model.embed_tokens", "q_proj"]}),
    "an embedding by a pattern": ("gpt2", {"target_modules": r"transformer\.wte", "use_rslora": True}),
    "dora of an embedding": ("gemma2", {"target_modules": ["model.embed_tokens"], "use_dora": True}),
}


@pytest.mark.parametrize("case", THEIRS)
def test_we_answer_as_peft_does_and_write_back_every_byte(case: str, tmp_path: Path) -> None:
    name, options = THEIRS[case]
    base = base_of(name)
    model = made_by_peft(base, tmp_path / "theirs", peft.LoraConfig(**LORA, **options))
    back = PEFT.read(tmp_path / "theirs", base)
    mine = incoming(base, back.config, back.tensors)
    assert_equal_answers(ours(mine), theirs(model), base)
    (tmp_path / "again").mkdir()
    PEFT.write(mine, tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "theirs" / TENSORS))
    assert back.notes == ()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt"])
def test_what_peft_stores_of_the_base_beside_an_embedding_is_compared_and_left_out(
    name: str, dora: bool, tmp_path: Path
) -> None:
    base = base_of(name)
    given = peft.LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head"], use_dora=dora)
    model = made_by_peft(base, tmp_path / "theirs", given)
    theirs_stored = load_file(tmp_path / "theirs" / TENSORS)
    of_the_base = {n for n in theirs_stored if n.endswith(".base_layer.weight")}
    assert len(of_the_base) == 2
    back = PEFT.read(tmp_path / "theirs", base)
    mine = incoming(base, back.config, back.tensors)
    assert_equal_answers(ours(mine), theirs(model), base)
    assert len(back.notes) == 1
    assert "were left out" in back.notes[0]
    (tmp_path / "again").mkdir()
    PEFT.write(mine, tmp_path / "again")
    learned = {n: t for n, t in theirs_stored.items() if n not in of_the_base}
    assert_same_tensors(load_file(tmp_path / "again" / TENSORS), learned)

    one = min(of_the_base)
    change(tmp_path / "theirs", {}, lambda tensors: tensors[one].add_(1e-3))
    assert set(refused(tmp_path / "theirs", base)) == {one}


UNEVEN_DORA = {
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "ranks": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {r"layers\.2\.mlp\.down_proj": 2}},
    "weights": {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 11}},
}


@pytest.mark.parametrize("case", UNEVEN_DORA)
def test_dora_that_differs_by_layer_is_the_same_function(case: str, tmp_path: Path) -> None:
    base = base_of("llama-tied")
    model = made_by_peft(base, tmp_path, peft.LoraConfig(**LORA, **UNEVEN_DORA[case], use_dora=True))
    back = PEFT.read(tmp_path, base)
    assert_equal_answers(ours(incoming(base, back.config, back.tensors)), theirs(model), base)
    assert back.notes, "what was rewritten is said"


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
def test_a_fused_site_of_which_dora_learned_only_the_length_is_kept(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    config = LoRA(rank=2, dora=True, roles=(Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V))
    mine = adapted(base, config)
    tensors = mine.delta.export()
    for site in mine.delta.sites():
        if site.role is Role.ATTN_K:
            tensors[f"{site.key}.B"].zero_()
    mine = incoming(base, config, tensors)
    PEFT.write(mine, tmp_path)
    back = PEFT.read(tmp_path, base)
    assert_equal_answers(theirs(loaded_by_peft(base, tmp_path)), ours(mine), base)
    assert_equal_answers(ours(incoming(base, back.config, back.tensors)), ours(mine), base)
    assert back.config.roles == config.roles  # type: ignore[attr-defined]


UNEVEN = {
    "ranks": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {r"layers\.2\.mlp\.down_proj": 2}},
    "weights": {"target_modules": ["q_proj", "k_proj"], "alpha_pattern": {r"layers\.1\.self_attn\.k_proj": 11}},
    "ranks and weights, stabilised": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"1.mlp.down_proj": 7, "down_proj": 1},
        "alpha_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "one layer": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": 1},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]},
    "only here": {"target_modules": ["model.layers.1.self_attn.q_proj", "0.mlp.gate_proj"]},
}


@pytest.mark.parametrize("case", UNEVEN)
def test_what_differs_by_layer_is_the_same_function(case: str, tmp_path: Path) -> None:
    base = base_of("llama-tied")
    model = made_by_peft(base, tmp_path, peft.LoraConfig(**LORA, **UNEVEN[case]))
    back = PEFT.read(tmp_path, base)
    assert_equal_answers(ours(incoming(base, back.config, back.tensors)), theirs(model), base)
    assert back.notes, "what was rewritten is said"


@pytest.mark.parametrize("layers", [[1, 2], [2], 2])
def test_the_last_layers_come_in_as_such(layers: list[int] | int, tmp_path: Path) -> None:
    base = base_of("llama-tied")
    config = peft.LoraConfig(**LORA, target_modules=["v_proj", "down_proj"], layers_to_transform=layers)
    model = made_by_peft(base, tmp_path / "theirs", config)
    back = PEFT.read(tmp_path / "theirs", base)
    mine = incoming(base, back.config, back.tensors)
    assert_equal_answers(ours(mine), theirs(model), base)
    assert back.config.top_layers == (len(layers) if isinstance(layers, list) else 1)  # type: ignore[attr-defined]
    assert back.notes == ()
    (tmp_path / "again").mkdir()
    PEFT.write(mine, tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "theirs" / TENSORS))


def test_half_precision_comes_in(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    made_by_peft(base, tmp_path, peft.LoraConfig(**LORA, target_modules=["q_proj"]))
    halved = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / TENSORS).items()}
    save_file(halved, tmp_path / TENSORS)
    back = PEFT.read(tmp_path, base)
    assert_equal_answers(ours(incoming(base, back.config, back.tensors)), theirs(loaded_by_peft(base, tmp_path)), base)


def test_a_config_with_only_what_is_needed(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    mine = adapted(base, LoRA(rank=8, alpha=8.0, roles=(Role.ATTN_Q,)))
    PEFT.write(mine, tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    assert_same_tensors(PEFT.read(tmp_path, base).tensors, mine.delta.export())


def test_the_older_pickle_form_is_read_as_tensors_alone(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    mine = adapted(base, LoRA(rank=3))
    PEFT.write(mine, tmp_path)
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    assert_same_tensors(PEFT.read(tmp_path, base).tensors, mine.delta.export())
