"""Adaptations of tiny bases as after some training, and logits of both sides on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import tritune as tt
from tests.oracles import packed_logits, rows_of
from tests.parity.seen import SEEN, family_of, is_tiny
from tritune.adaptation import Adaptation, Origin
from tritune.errors import Mismatch
from tritune.methods import method_of
from tritune.models.pretrained import Base
from tritune.run import Training
from tritune.spec import MethodConfig
from tritune.tasks.classification import Classification

ROWS = rows_of((7, 12, 3))
#: the packaged base itself: everything that is exchanged is exchanged on it too
REAL = "smollm2-135m"


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


#: the format that tests are about, by the beginning of their file's name
FORMAT_OF = {"test_peft": "peft", "test_adapter_hub": "adapters", "test_merged": "merged", "test_gguf": "gguf"}


@pytest.fixture(autouse=True)
def what_is_exchanged(request: pytest.FixtureRequest) -> None:
    file = request.module.__name__.rpartition(".")[2]
    SEEN.method, SEEN.format = None, next((form for name, form in FORMAT_OF.items() if file.startswith(name)), None)


def task() -> Classification:
    return tt.classification(test=[{"text": "good one", "label": "yes"}, {"text": "bad one", "label": "no"}])


def adapted(base: Base, config: MethodConfig, size: float | None = None) -> Adaptation:
    """Every tensor away from its start, by `size`."""
    size = size or (0.1 if is_tiny(base) else 0.02)  # a real base has less room
    SEEN.method = method_of(config).kind
    delta = method_of(config).init(config, base, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return Adaptation(base, task(), config, delta.export(), Origin(Training(), 1e-3, 0, 7, {}))


@torch.no_grad()
def ours(adaptation: Adaptation) -> list[Tensor]:
    with adaptation.base.bind(adaptation.delta):
        return packed_logits(adaptation.base, ROWS)


def incoming(base: Base, config: MethodConfig, tensors: Mapping[str, Tensor]) -> Adaptation:
    SEEN.method = method_of(config).kind
    return Adaptation(base, task(), config, tensors, Origin(Training(), 0.0, 0, 0, {}))


def assert_equal_answers(got: Sequence[Tensor], wanted: Sequence[Tensor], base: Base) -> None:
    """Within 1e-4 of the largest logit, and visibly not the bare base."""
    SEEN.note(got, wanted, family_of(base))
    with torch.no_grad():
        bare = packed_logits(base, ROWS)
    for a, b, c in zip(got, wanted, bare, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())
        assert not torch.allclose(b, c, atol=1e-2), "the adaptation makes no difference"


def assert_same_tensors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Byte by byte."""
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


def problems(error: Mismatch) -> dict[str, str]:
    found = {problem.where: problem.what for problem in error.problems}
    assert all(where in str(error) for where in list(found)[: Mismatch.shown])
    return found
