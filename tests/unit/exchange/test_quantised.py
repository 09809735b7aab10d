"""Exchange of what was trained on a quantised base: merged into the dequantised weights, or written for the original ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.oracles import packed_logits, stock_logits
from tests.unit.exchange.conftest import ROWS, adapted, assert_equal_answers, ours
from tests.unit.models import tiny_gguf
from tritune.errors import NotMergeable
from tritune.exchange import format_named
from tritune.exchange.gguf.model import FILE
from tritune.exchange.inward import import_folder
from tritune.exchange.outward import export
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.models.base import Role
from tritune.models.load import load_base
from tritune.models.tiny import tiny_base
from tritune.spec import MethodConfig, Quantisation


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("bases")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITUNE_CACHE", str(root / "cache"))
    for name in ("llama-tied", "gpt2"):
        base = tiny_base(name)
        base.save_pretrained(root / name, base.parameters())
    yield root
    patch.undo()


@pytest.mark.parametrize(
    ("name", "form", "config"),
    [("llama-tied", "nf4", LoRA(rank=3)), ("gpt2", "int8", LoRA(rank=2, start="pissa")), ("gpt2", "nf4", IA3())],
    ids=["lora", "pissa", "ia3"],
)
def test_merged_it_is_the_dequantised_base_with_the_adaptation(
    name: str, form: Quantisation, config: MethodConfig, folders: Path, tmp_path: Path
) -> None:
    mine = adapted(load_base(folders / name, dtype="float32", device="cpu", quantise=form), config)
    done = export(mine, "merged", tmp_path / "out")
    assert done.verdict.holds
    assert done.verdict.difference < 1e-3, "stated, and no more than rounding"
    assert done.notes == (
        f"the weights are those of the {form} base it was trained on, dequantised, not the original ones",
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs = [stock_logits(model.eval(), row) for row in ROWS]
    assert_equal_answers(theirs, ours(mine), mine.base)


def test_a_base_in_bfloat16_states_what_its_sums_lose(folders: Path, tmp_path: Path) -> None:
    # the usual tiny base has large weights, and makes so much of rounding that no merge of it holds in bfloat16
    given = tiny_base("llama").parameters()
    calm = {name: t * 0.4 if t.ndim > 1 and "embed" not in name else t for name, t in given.items()}
    tiny_base("llama").save_pretrained(tmp_path / "base", calm)
    base = load_base(tmp_path / "base", dtype="bfloat16", device="cpu", quantise="nf4")
    done = export(adapted(base, LoRA(rank=3, alpha=3.0)), "merged", tmp_path / "out")
    assert 1e-4 * done.verdict.largest < done.verdict.difference < 5e-2 * done.verdict.largest
    assert "largest difference of a logit" in str(done.verdict)


def test_as_gguf_it_has_the_weights_that_were_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside changed weights the file keeps others as they were, but these were not what the adaptation learned on."""
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))
    source = tiny_gguf.write(tmp_path / "tiny.gguf")
    mine = adapted(load_base(source, dtype="float32", device="cpu", quantise="nf4"), LoRA(rank=2, roles=(Role.ATTN_Q,)))
    (tmp_path / "out").mkdir()
    format_named("gguf").write(mine, tmp_path / "out")
    again = load_base(tmp_path / "out" / FILE, dtype="float32", device="cpu")
    with torch.no_grad():
        assert_equal_answers(packed_logits(again, ROWS), ours(mine), mine.base)


def test_what_is_no_weight_is_refused_as_ever(folders: Path, tmp_path: Path) -> None:
    base = load_base(folders / "llama-tied", dtype="float32", device="cpu", quantise="nf4")
    with pytest.raises(NotMergeable):
        export(adapted(base, Prefix(tokens=2)), "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_is_for_the_original_weights_and_says_so(folders: Path, tmp_path: Path) -> None:
    """PEFT loads the base as it likes; what is compared is the adapter, on the weights that the folder names."""
    base = load_base(folders / "llama-tied", dtype="float32", device="cpu", quantise="nf4")
    mine = adapted(base, LoRA(rank=3, roles=(Role.ATTN_Q, Role.MLP_DOWN)))
    done = export(mine, "peft", tmp_path / "out")
    assert done.verdict.by.startswith("peft ")
    assert done.notes == (
        "trained on nf4 weights; compared on the original ones, where it may answer slightly differently",
    )
    back = import_folder(tmp_path / "out", base, verify=False)
    assert back.notes == ()
    for got, wanted in zip(ours(back.adaptation), ours(mine), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    floats = load_base(folders / "llama-tied", dtype="float32", device="cpu")
    note = "trained on nf4 weights of the base, and now on unquantised ones: its answers may differ slightly"
    assert import_folder(tmp_path / "out", floats, verify=False).notes == (note,)
