"""What we write PEFT reads and answers alike, and we read it back; what it has no place for is refused.

The oracle is PEFT itself, in this process; `test_exchange.py` has it in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file

from tests.oracles import base_of
from tests.unit.exchange.conftest import REAL, adapted, assert_equal_answers, assert_same_tensors, incoming, ours
from tests.unit.exchange.peft_side import PEFT, loaded_by_peft, theirs
from tritune.errors import Mismatch
from tritune.exchange.peft import CONFIG, TENSORS
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

FAMILIES = ("llama-tied", "gpt2", "gpt-neox", "phi3", "opt-post-norm", "gemma2")
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


def test_keys_and_values_behind_the_text_are_refused(tmp_path: Path) -> None:
    mine = adapted(base_of("llama-tied"), Prefix(tokens=3, placement="suffix"))
    with pytest.raises(Mismatch, match="'suffix'; PEFT's keys and values stand in front"):
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


def test_scales_on_both_sides_of_a_matrix_are_refused(tmp_path: Path) -> None:
    both = IA3(output_roles=(Role.MLP_DOWN,), input_roles=(Role.MLP_DOWN,))
    with pytest.raises(Mismatch, match=r"'mlp\.down': is scaled on both sides"):
        PEFT.write(adapted(base_of("llama-tied"), both), tmp_path)
