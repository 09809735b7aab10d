"""Of transformers comes what is needed, and nothing that it does is another for it."""

from __future__ import annotations

import ast
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import tritune
from tritune.models.library import MEANWHILE
from tritune.models.tiny import tiny_base

#: large, and no part of a training run
LARGE = ("torch._dynamo", "torch.distributed.tensor", "sympy", "scipy", "accelerate")

RUN = """
import sys
from tritune.process import settle
if sys.argv[2] == "lean":
    settle()
import torch
from tritune import load_base
from tritune.methods import method
from tritune.models.base import Batch, Span
base = load_base(sys.argv[1], dtype="float32")
found = method("lora")
delta = found.init(found.Config(), base, torch.Generator().manual_seed(0))
at = torch.arange(10)
with base.bind(delta):
    logits = base.logits(Batch(torch.arange(5, 15), (Span(0, 10),)), at)
    logits.square().sum().backward()
slope = sum(float(p.grad.double().abs().sum()) for p in delta.trainable().values())
buffers = [(name, str(b.device), b.double().sum().item()) for name, b in base.model.named_buffers()]
print(logits.double().sum().item(), slope, buffers)
print([name for name in sys.argv[3:] if name in sys.modules])
"""


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_base_is_the_same_with_less_in_memory(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)

    def run(how: str) -> list[str]:
        command = [sys.executable, "-c", RUN, str(tmp_path), how, *LARGE]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    (values, lean), (expected, plain) = run("lean"), run("plain")
    assert values == expected
    assert len(ast.literal_eval(lean)) < len(ast.literal_eval(plain))
    assert "sympy" not in lean
    assert "torch._dynamo" not in lean


@pytest.mark.parametrize("name", MEANWHILE)
def test_stand_ins_say_of_plain_values_what_the_functions_say(name: str) -> None:
    from torch.fx.experimental import symbolic_shapes

    real, of_plain = getattr(symbolic_shapes, name.rpartition(".")[2]), MEANWHILE[name]
    truths = [True, False]
    cases: list[tuple[Any, ...]] = [(truth,) for truth in truths]
    if name.endswith(("sym_and", "sym_or")):
        cases += [*product(truths, repeat=2), *product(truths, repeat=3)]
    elif name.endswith("sym_eq"):
        numbers, shapes = [0, 1, 3], [(), (1,), (1, 3), [1, 3], [3, 1], torch.Size((1, 3))]
        cases = [*product(numbers, repeat=2), *product(shapes, repeat=2)]
    elif name.endswith("is_nested_int"):
        cases = [(0,), (3,), (2.5,)]
    assert cases
    assert [bool(of_plain(*case)) for case in cases] == [bool(real(*case)) for case in cases]


def test_there_is_one_door() -> None:
    """Whoever imported transformers elsewhere first would bring all of it."""
    source = Path(tritune.__file__).parent
    for path in source.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name and name.partition(".")[0] == "transformers" for name in names):
                assert path.name == "library.py", f"{path} imports transformers: use models/library.py"
