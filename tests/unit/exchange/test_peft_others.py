"""Prompts, prefixes and scales that PEFT wrote: we answer as it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file

from tests.oracles import base_of
from tests.unit.exchange.conftest import assert_equal_answers, assert_same_tensors, incoming, ours
from tests.unit.exchange.peft_side import PEFT, made_by_peft, theirs
from tritune.exchange.peft import TENSORS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
PROMPTS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "P_TUNING": lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=6),
    "P_TUNING, LSTM": lambda: peft.PromptEncoderConfig(
        **PROMPT, encoder_hidden_size=6, encoder_reparameterization_type="LSTM", encoder_num_layers=1
    ),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**PROMPT),
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3"])
def test_prompts_come_in(name: str, case: str, tmp_path: Path) -> None:
    base = base_of(name)
    model = made_by_peft(base, tmp_path / "theirs", PROMPTS[case]())
    back = PEFT.read(tmp_path / "theirs", base)
    mine = incoming(base, back.config, back.tensors)
    assert_equal_answers(ours(mine), theirs(model), base)
    assert bool(back.notes) == case.startswith("P_TUNING"), "that the encoder is lost is said"
    (tmp_path / "again").mkdir()
    PEFT.write(mine, tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "theirs" / TENSORS))


PREFIXES: Mapping[str, dict[str, Any]] = {
    "keys and values": {},
    "a network": {"prefix_projection": True, "encoder_hidden_size": 6},
}


@pytest.mark.parametrize("case", PREFIXES)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "phi3"])
def test_prefixes_come_in(name: str, case: str, tmp_path: Path) -> None:
    base = base_of(name)
    given = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **PREFIXES[case])
    model = made_by_peft(base, tmp_path / "theirs", given)
    back = PEFT.read(tmp_path / "theirs", base)
    mine = incoming(base, back.config, back.tensors)
    assert_equal_answers(ours(mine), theirs(model), base)
    assert bool(back.notes) == (case == "a network"), "that the network is lost is said"
    (tmp_path / "again").mkdir()
    PEFT.write(mine, tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "theirs" / TENSORS))


IA3S: Mapping[str, tuple[str, dict[str, Any]]] = {
    "their default": ("llama-tied", {}),
    "a pattern": ("gemma2", {"target_modules": r".*\.(v|down)_proj", "feedforward_modules": r".*\.down_proj"}),
    "fused": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    "interleaved": ("gpt-neox", {"target_modules": ["query_key_value", "dense"], "feedforward_modules": []}),
    "input side of attention": (
        "opt-post-norm",
        {"target_modules": ["out_proj", "fc2"], "feedforward_modules": ["out_proj"]},
    ),
    "one layer": ("qwen3", {"target_modules": ["layers.1.self_attn.k_proj"], "feedforward_modules": []}),
}


@pytest.mark.parametrize("case", IA3S)
def test_scales_come_in(case: str, tmp_path: Path) -> None:
    name, options = IA3S[case]
    base = base_of(name)
    model = made_by_peft(base, tmp_path / "theirs", peft.IA3Config(task_type="CAUSAL_LM", **options))
    back = PEFT.read(tmp_path / "theirs", base)
    mine = incoming(base, back.config, back.tensors)
    assert_equal_answers(ours(mine), theirs(model), base)
    assert bool(back.notes) == (case == "one layer")
    if case != "one layer":
        (tmp_path / "again").mkdir()
        PEFT.write(mine, tmp_path / "again")
        assert_same_tensors(load_file(tmp_path / "again" / TENSORS), load_file(tmp_path / "theirs" / TENSORS))
