"""A merged folder is a model of its own: transformers alone answers as the live adaptation does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.oracles import base_of, stock_logits
from tests.unit.exchange.conftest import REAL, ROWS, adapted, assert_equal_answers, ours
from tritune.errors import Mismatch, NotMergeable
from tritune.exchange import format_named, recognise
from tritune.exchange.outward import export
from tritune.exchange.sidecar import SIDECAR
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.full import Full
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role
from tritune.models.load import load_base
from tritune.spec import MethodConfig

MERGED = format_named("merged")


CASES = {
    "lora": LoRA(rank=3),
    "rs": LoRA(rank=2, rank_stabilised=True),
    "olora by role": LoRA(rank=2, ranks={Role.ATTN_V: 4}, alphas={Role.ATTN_O: 5.0}, start="olora"),
    "ia3": IA3(),
    "full": Full(),
    "parts": Full(parts=("norms", "embeddings"), layer_decay=0.5),
    "top layer": Full(top_layers=1),
}
FAMILIES = ("llama-tied", "gpt2", "gpt-neox", "phi3", "opt-post-norm", "gemma2")
CELLS = [*((name, case) for name in FAMILIES for case in CASES), *((REAL, case) for case in ("lora", "ia3", "full"))]


@pytest.mark.parametrize(("name", "case"), CELLS)
def test_transformers_answers_as_we_do(name: str, case: str, tmp_path: Path) -> None:
    mine = adapted(base_of(name), CASES[case])
    MERGED.write(mine, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = [stock_logits(model, row) for row in ROWS]
    shutil.rmtree(tmp_path)  # a whole model each time
    merged = mine.method.merge(mine.delta, mine.base)
    assert all(torch.equal(model.get_parameter(weight), tensor) for weight, tensor in merged.items()), "every byte"
    assert_equal_answers(theirs, ours(mine), mine.base)


def test_it_is_a_base_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verified in a process of its own, published, and then a base like any other, not an adaptation."""
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))
    mine = adapted(base_of("llama-tied"), LoRA(rank=3))
    done = export(mine, "merged", tmp_path / "out")
    assert done.verdict.by.startswith("transformers ")
    assert done.verdict.holds
    assert (tmp_path / "out" / SIDECAR).is_file()
    assert load_base(tmp_path / "out", dtype="float32", device="cpu").digests.weights != mine.base.digests.weights
    with pytest.raises(Mismatch, match="--base"):
        recognise(tmp_path / "out")


@pytest.mark.parametrize("config", [PTuning(tokens=2, encoder="none"), Bottleneck()], ids=["prompt", "bottleneck"])
def test_what_is_no_weight_is_refused_with_the_reason(config: MethodConfig, tmp_path: Path) -> None:
    with pytest.raises(NotMergeable):
        export(adapted(base_of("llama-tied"), config), "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
