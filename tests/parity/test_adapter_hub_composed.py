"""Stacked and fused bottleneck adapters against adapter-hub's own package: logits and gradients.

Live where TRITUNE_ADAPTERS_PYTHON names a Python that has the package: all on SmolLM2-135M, on a tiny Llama and on five more
families, one of them post-norm; else part of it, as recorded (`record_adapter_hub_composed.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles import packed_logits
from tests.parity import seen
from tests.parity.adapter_hub import adapter_value, rows, weights
from tests.parity.adapter_hub_composed import CASES, LIVE, RECORDED, case_on, nudged
from tests.parity.test_adapter_hub import PYTHON, assert_as_in_package, base_named, computed_live, own_config
from tritune.methods import method_of
from tritune.methods.fusion import Fusion
from tritune.methods.stack import Stack

RECORDING = Path(__file__).with_name("adapter_hub_composed.safetensors")
RECORDED_CELLS = [(model, case) for model, cases in RECORDED.items() for case in cases]
CELLS = [(model, case) for model in LIVE for case in CASES] if PYTHON else RECORDED_CELLS


def config_of(model: str, case: str) -> Stack | Fusion:
    how, parts, fusion = case_on(model, case)
    configs = tuple(own_config(*part) for part in parts)
    return Stack.of(configs) if how == "stack" else Fusion(parts=configs, value=fusion == "dynamic")


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    if PYTHON is None:
        return load_file(RECORDING)
    return computed_live(PYTHON, "record_adapter_hub_composed.py", tmp_path_factory)


def test_the_recording_is_of_these_cases(package: dict[str, Tensor]) -> None:
    recorded = load_file(RECORDING)
    assert set(recorded) == {
        f"{model}/{case}/{what}" for model, case in RECORDED_CELLS for what in ("logits", "gradients")
    }
    for name, tensor in recorded.items():  # and the package still computes it
        torch.testing.assert_close(package[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))


@pytest.mark.parametrize(("model", "case"), CELLS)
def test_composed_adapters_are_adapter_hubs(model: str, case: str, package: dict[str, Tensor]) -> None:
    base, config = base_named(model), config_of(model, case)
    its = method_of(config)
    seen.SEEN.comparing(its.kind, case, base, "adapters")
    tensors = {
        name: nudged(name, adapter_value(name, shape, model), model) for name, shape in its.shapes(config, base).items()
    }
    delta = its.load(config, base, tensors).eval()
    with base.bind(delta):
        logits = packed_logits(base, rows(model))
        sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()  # type: ignore[union-attr]
    assert_as_in_package(base, delta, logits, package, f"{model}/{case}", rows(model))
