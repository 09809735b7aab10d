"""PEFT's folders: what we write PEFT reads, what PEFT writes we read, and both compute the same.

The oracle is PEFT itself, in this process; `test_exchange.py` has it in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import oracles
from tests.oracles import base_of
from tests.unit.exchange.conftest import (
    REAL,
    ROWS,
    adapted,
    assert_equal_answers,
    assert_same_tensors,
    incoming,
    ours,
    problems,
)
from tritune.errors import Mismatch
from tritune.exchange import format_named
from tritune.exchange.peft import CONFIG, TENSORS
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role
from tritune.models.pretrained import Base

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

PEFT = format_named("peft")
FAMILIES = ("llama-tied", "gpt2", "gpt-neox", "phi3", "opt-post-norm", "gemma2")


@torch.no_grad()
def theirs(model: Any) -> list[Tensor]:
    return [model(input_ids=torch.tensor([row])).logits[0, -len(row) :] for row in ROWS]


def loaded_by_peft(base: Base, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(oracles.stock(base), str(folder)).eval()


def made_by_peft(base: Base, folder: Path, config: peft.PeftConfig) -> Any:
    """A model of PEFT's with everything away from its start, saved by PEFT."""
    model = peft.get_peft_model(oracles.stock(base), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(str(folder))
    return model.eval()


# --- ours -> theirs -> ours ---

OURS = {
    "lora": LoRA(rank=3),
    "lora of some roles": LoRA(rank=2, alpha=5.0, roles=(Role.ATTN_Q, Role.ATTN_V)),
    "rank-stabilised lora": LoRA(rank=3, alpha=7.0, rank_stabilised=True, dropout=0.25),
    "lora of other ranks and weights": LoRA(
        rank=2,  # v of another rank than q but of the same scale: they may share a matrix
        alpha=3.0,
        ranks={Role.ATTN_O: 5, Role.ATTN_V: 1},
        alphas={Role.ATTN_O: 1.0, Role.ATTN_V: 1.5},
    ),
    "pissa": LoRA(rank=2, alpha=3.0, start="pissa", rank_stabilised=True),
    "olora of other ranks": LoRA(
        rank=2, roles=(Role.ATTN_Q, Role.ATTN_O, Role.MLP_DOWN), ranks={Role.ATTN_O: 3}, start="olora"
    ),
    "dora": LoRA(rank=3, dora=True),
    "dora of q and v, rank-stabilised": LoRA(
        rank=2, dora=True, rank_stabilised=True, roles=(Role.ATTN_Q, Role.ATTN_V, Role.MLP_DOWN), dropout=0.25
    ),
    "dora of other ranks": LoRA(rank=2, dora=True, ranks={Role.ATTN_O: 5}, alphas={Role.ATTN_O: 1.0}),
    "dora from pissa": LoRA(rank=2, dora=True, start="pissa", roles=(Role.ATTN_O, Role.MLP_DOWN)),
    "lora in the last layers": LoRA(rank=3, top_layers=2),
    "the last layer and both ends": LoRA(rank=2, top_layers=1, roles=(Role.ATTN_Q, Role.ATTN_V, Role.EMBED, Role.HEAD)),
    "dora in the last layer": LoRA(rank=2, dora=True, top_layers=1, ranks={Role.ATTN_O: 3}),
    "embedding": LoRA(rank=3, alpha=2.0, roles=(Role.EMBED,), rank_stabilised=True),
    "head": LoRA(rank=3, alpha=2.0, roles=(Role.HEAD,)),
    "both ends and a layer": LoRA(rank=3, alpha=2.0, roles=(Role.ATTN_Q, Role.EMBED, Role.HEAD)),
    "dora at both ends": LoRA(
        rank=3, alpha=2.0, roles=(Role.MLP_UP, Role.EMBED, Role.HEAD), dora=True, ranks={Role.HEAD: 2}
    ),
    "p-tuning": PTuning(tokens=4, hidden=8),
    "p-tuning, lstm": PTuning(tokens=3, encoder="lstm", hidden=5, start="random"),
    "prompt tuning": PTuning(tokens=5, encoder="none"),
    "prefix": Prefix(tokens=3),
    "prefix, network": Prefix(tokens=4, hidden=6, start="random"),
    "ia3": IA3(),
    "ia3 in the last layers": IA3(top_layers=2),
    "ia3 on other places": IA3(output_roles=(Role.ATTN_Q, Role.MLP_UP), input_roles=(Role.ATTN_O, Role.MLP_DOWN)),
}


#: one of each kind on the real base: what else there is, is the same form with other numbers
ON_REAL = ("lora", "rank-stabilised lora", "p-tuning", "prompt tuning", "prefix", "ia3")
CELLS = [*((name, case) for name in FAMILIES for case in OURS), *((REAL, case) for case in ON_REAL)]


@pytest.mark.parametrize(("name", "case"), CELLS)
def test_peft_answers_as_we_do_and_we_read_back_every_byte(name: str, case: str, tmp_path: Path) -> None:
    base, config = base_of(name), OURS[case]
    mine = adapted(base, config)
    PEFT.write(mine, tmp_path)
    model = loaded_by_peft(base, tmp_path)
    learned = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert_same_tensors(learned, load_file(tmp_path / TENSORS))
    assert_equal_answers(theirs(model), ours(mine), base)

    back = PEFT.read(tmp_path, base)
    assert_same_tensors(back.tensors, mine.delta.export())
    assert back.notes == () or isinstance(config, PTuning)
    if isinstance(config, LoRA):
        assert back.config == plain(config)
    if isinstance(config, IA3):
        assert back.config == config


def plain(config: LoRA) -> LoRA:
    """What starts at zero and holds the same: a start that is none stays in what is exported, as twice the rank."""
    if config.start == "zero":
        return config
    more = 2**0.5 if config.rank_stabilised else 2
    return config.model_copy(
        update={
            "start": "zero",
            "rank": 2 * config.rank,
            "ranks": {role: 2 * rank for role, rank in config.ranks.items()},
            "alpha": float(f"{config.alpha * more:.12g}"),
        }
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "phi3"])
def test_one_scale_for_a_fused_matrix(name: str, tmp_path: Path) -> None:
    """Sites of one matrix with other weights: the difference goes into B, so the bytes change and the answers do not."""
    base = base_of(name)
    mine = adapted(base, LoRA(rank=2, roles=(Role.ATTN_Q, Role.ATTN_V), alphas={Role.ATTN_V: 5.0}))
    PEFT.write(mine, tmp_path)
    assert_equal_answers(theirs(loaded_by_peft(base, tmp_path)), ours(mine), base)
    back = PEFT.read(tmp_path, base)
    assert_equal_answers(ours(incoming(base, back.config, back.tensors)), ours(mine), base)


@pytest.mark.parametrize("placement", ["suffix", "around"])
def test_prompts_that_do_not_stand_in_front_are_refused(placement: Any, tmp_path: Path) -> None:
    front = 1 if placement == "around" else None
    mine = adapted(base_of("llama-tied"), PTuning(tokens=3, encoder="none", placement=placement, front=front))
    with pytest.raises(Mismatch, match=f"'{placement}'; PEFT's prompts stand in front"):
        PEFT.write(mine, tmp_path)


@pytest.mark.parametrize("case", OURS)
def test_every_key_that_is_written_is_one_of_pefts(case: str, tmp_path: Path) -> None:
    """Unknown keys PEFT drops with a warning."""
    PEFT.write(adapted(base_of("llama-tied"), OURS[case]), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    assert set(config) <= set(kind().to_dict()) | {"runtime_config"}
    assert config["inference_mode"] is True


def test_a_method_that_peft_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="has no place for 'bottleneck'"):
        PEFT.write(adapted(base_of("llama-tied"), Bottleneck()), tmp_path)


# --- theirs -> ours (-> theirs) ---

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "init_lora_weights": False}
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


def test_scales_on_both_sides_of_a_matrix_are_refused(tmp_path: Path) -> None:
    both = IA3(output_roles=(Role.MLP_DOWN,), input_roles=(Role.MLP_DOWN,))
    with pytest.raises(Mismatch, match=r"'mlp\.down': is scaled on both sides"):
        PEFT.write(adapted(base_of("llama-tied"), both), tmp_path)


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


# --- everything that does not fit, at once ---


def change(folder: Path, config: Mapping[str, Any], tensors: Callable[[dict[str, Tensor]], None]) -> None:
    found = load_file(folder / TENSORS)
    tensors(found)
    save_file(found, folder / TENSORS)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))


def refused(folder: Path, base: Base) -> dict[str, str]:
    with pytest.raises(Mismatch) as caught:
        PEFT.read(folder, base)
    return problems(caught.value)


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


def test_the_older_pickle_form_is_read_as_tensors_alone(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    mine = adapted(base, LoRA(rank=3))
    PEFT.write(mine, tmp_path)
    torch.save(load_file(tmp_path / TENSORS), tmp_path / "adapter_model.bin")
    (tmp_path / TENSORS).unlink()
    assert_same_tensors(PEFT.read(tmp_path, base).tensors, mine.delta.export())


def test_an_adaptation_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    base = base_of("llama-tied")
    PEFT.write(adapted(base, LoRA(rank=3)), tmp_path)
    change(tmp_path, {"target_modules": ["query"]}, lambda tensors: tensors.clear())
    assert "matches no module" in refused(tmp_path, base)["config key 'target_modules'"]
