"""GGUF files: the merged model is read back by transformers' own reader, the adapter says the same as the merged model.

With TRITUNE_LLAMA_PYTHON naming a Python that has llama_cpp, llama.cpp also answers in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from tests.oracles import base_of, packed_logits
from tests.parity.seen import SEEN
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
from tests.unit.models import tiny_gguf
from tritune.errors import Mismatch, NotMergeable
from tritune.exchange import format_named, outward
from tritune.exchange.format import Absent
from tritune.exchange.gguf.lora import ALPHA
from tritune.exchange.gguf.lora import FILE as ADAPTER
from tritune.exchange.gguf.model import FILE as MODEL
from tritune.exchange.outward import export
from tritune.methods.full import Full
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role
from tritune.models.load import load_base
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig

WHOLE, ON_TOP = format_named("gguf"), format_named("gguf-lora")
PYTHON = os.environ.get("TRITUNE_LLAMA_PYTHON")
with_llama = pytest.mark.skipif(PYTHON is None, reason="TRITUNE_LLAMA_PYTHON names no Python that has llama_cpp")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    """A Llama of a few kilobytes that came as a GGUF file, with fewer key heads than query heads."""
    root = tmp_path_factory.mktemp("gguf")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITUNE_CACHE", str(root / "cache"))
    yield load_base(tiny_gguf.write(root / "tiny.gguf"), dtype="float32", device="cpu")
    patch.undo()


UNEVEN = LoRA(
    rank=2,
    alpha=3.0,
    rank_stabilised=True,
    ranks={Role.ATTN_Q: 5, Role.MLP_UP: 1},
    alphas={Role.MLP_UP: 7.0},
    start="pissa",
)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("config", [LoRA(rank=3), IA3(), Full()], ids=["lora", "ia3", "full"])
def test_transformers_reads_a_merged_model_as_we_mean_it(base: Base, config: MethodConfig, tmp_path: Path) -> None:
    mine = adapted(base, config)
    WHOLE.write(mine, tmp_path)
    again = load_base(tmp_path / MODEL, dtype="float32", device="cpu")
    with torch.no_grad():
        assert_equal_answers(packed_logits(again, ROWS), ours(mine), base)
    assert again.digests.tokenizer == base.digests.tokenizer, "header and vocabulary are those of the base's file"
    assert again.digests.config == base.digests.config


def test_what_did_not_change_keeps_its_bytes(base: Base, tmp_path: Path) -> None:
    WHOLE.write(adapted(base, LoRA(rank=2, roles=(Role.ATTN_Q,))), tmp_path)
    assert base.located is not None
    before, after = tensors(Path(base.located.ref)), tensors(tmp_path / MODEL)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}


@pytest.mark.parametrize(
    "config", [LoRA(rank=3, alpha=5.0), LoRA(rank=2, rank_stabilised=True, roles=(Role.ATTN_K,)), UNEVEN]
)
def test_the_adapter_is_the_difference_to_the_merged_model(base: Base, config: LoRA, tmp_path: Path) -> None:
    """llama.cpp adds alpha / rank times B A to the weight of that name."""
    mine = adapted(base, config)
    WHOLE.write(mine, tmp_path)
    ON_TOP.write(mine, tmp_path)
    assert base.located is not None
    before, after, terms = tensors(Path(base.located.ref)), tensors(tmp_path / MODEL), tensors(tmp_path / ADAPTER)
    alpha = GGUFReader(tmp_path / ADAPTER).fields[ALPHA].contents()
    names = {name.removesuffix(".lora_a") for name in terms if name.endswith(".lora_a")}
    assert len(terms) == 2 * len(names) > 0
    for name, weight in before.items():
        wanted = weight
        if name in names:
            a, b = terms[f"{name}.lora_a"], terms[f"{name}.lora_b"]
            wanted = weight + alpha / b.shape[1] * (b @ a)
        torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_an_adapter_comes_back_with_every_byte(name: str, tmp_path: Path) -> None:
    """Ranks may differ from role to role where alpha is the same: llama.cpp divides by each one's own."""
    mine = adapted(base_of(name), LoRA(rank=3, alpha=6.0, ranks={Role.ATTN_V: 1, Role.MLP_DOWN: 4}))
    ON_TOP.write(mine, tmp_path)
    back = ON_TOP.read(tmp_path, mine.base)
    assert_same_tensors(back.tensors, mine.delta.export())
    assert back.config == mine.config


@pytest.mark.parametrize("name", ["llama-tied", REAL])
def test_scales_of_other_kinds_come_back_in_b(name: str, tmp_path: Path) -> None:
    mine = adapted(base_of(name), UNEVEN if name != REAL else UNEVEN.model_copy(update={"start": "zero"}))
    ON_TOP.write(mine, tmp_path)
    back = ON_TOP.read(tmp_path, mine.base)
    SEEN.format = ON_TOP.name
    assert_equal_answers(ours(incoming(mine.base, back.config, back.tensors)), ours(mine), mine.base)


def test_a_base_that_is_no_gguf_file(tmp_path: Path) -> None:
    """Its header is missing for a whole model; an adapter can be written, and our own reader looks at it."""
    mine = adapted(base_of("llama-tied"), LoRA(rank=2))
    with pytest.raises(Mismatch, match="--format merged"):
        export(mine, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    done = export(mine, "gguf-lora", tmp_path / "out")
    assert "own importer (llama.cpp needs the base as a GGUF file" in done.verdict.by


@pytest.mark.parametrize(
    ("name", "config", "where"),
    [("gpt2", LoRA(rank=2), {"family"}), ("phi3", PTuning(tokens=2, encoder="none"), {"family", "method"})],
)
def test_what_llama_cpp_takes_apart_its_own_way(
    name: str, config: MethodConfig, where: set[str], tmp_path: Path
) -> None:
    with pytest.raises(Mismatch) as caught:
        ON_TOP.write(adapted(base_of(name), config), tmp_path)
    assert set(problems(caught.value)) == where


def test_what_is_more_than_a_term_on_a_linear_map_is_named(base: Base, tmp_path: Path) -> None:
    config = LoRA(rank=2, dora=True, roles=(Role.ATTN_Q, Role.EMBED, Role.HEAD))
    with pytest.raises(Mismatch) as caught:
        ON_TOP.write(adapted(base, config), tmp_path)
    assert set(problems(caught.value)) == {"dora", "role 'embed'", "role 'head'"}


def test_a_whole_model_that_nothing_can_check_is_not_written(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> None:
        raise Absent("llama_cpp is not installed")

    monkeypatch.setattr(outward, "verify", absent)
    with pytest.raises(Mismatch, match=r"llama_cpp is not installed(.|\n)*--reference"):
        export(adapted(base, LoRA(rank=3)), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_cannot_be_merged(base: Base, tmp_path: Path) -> None:
    with pytest.raises(NotMergeable):
        WHOLE.write(adapted(base, PTuning(tokens=2, encoder="none")), tmp_path)


@with_llama
@pytest.mark.parametrize("format", ["gguf", "gguf-lora"])
@pytest.mark.parametrize("config", [LoRA(rank=3), LoRA(rank=2, rank_stabilised=True, roles=(Role.ATTN_Q,)), UNEVEN])
def test_llama_cpp_answers_as_we_do(base: Base, config: LoRA, format: str, tmp_path: Path) -> None:
    done = export(adapted(base, config), format, tmp_path / "out", python=PYTHON)
    assert done.verdict.by.startswith("llama.cpp ")
    assert done.verdict.difference < 1e-4 * done.verdict.largest
    assert done.verdict.effect > 0.5
