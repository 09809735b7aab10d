"""Stacked and fused bottleneck adapters against adapter-hub's own package: logits and gradients, as recorded or, where
TRITUNE_ADAPTERS_PYTHON names a Python that has it, as the package computes them now.

`record_adapter_hub_composed.py` says how the recording is made. Four families, one of them post-norm.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.oracles import packed_logits
from tests.parity import seen
from tests.parity.adapter_hub import adapter_value, rows, weights
from tests.parity.adapter_hub_composed import CASES, SEEN, nudged
from tests.parity.test_adapter_hub import PYTHON, assert_as_in_package, base_named, own_config
from tritune.methods import method_of
from tritune.methods.fusion import Fusion
from tritune.methods.stack import Stack

RECORDED = Path(__file__).with_name("adapter_hub_composed.safetensors")
CELLS = [(model, case) for model, cases in SEEN.items() for case in cases]


def config_of(case: str) -> Stack | Fusion:
    how, parts, fusion = CASES[case]
    configs = tuple(own_config(*part) for part in parts)
    return Stack.of(configs) if how == "stack" else Fusion(parts=configs, value=fusion == "dynamic")


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    if PYTHON is None:
        return load_file(RECORDED)
    out = tmp_path_factory.mktemp("composed") / "live.safetensors"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    script = RECORDED.with_name("record_adapter_hub_composed.py")
    subprocess.run([PYTHON, str(script), str(out)], check=True, env=environment)
    return load_file(out)


def test_the_recording_is_of_these_cases() -> None:
    assert set(load_file(RECORDED)) == {
        f"{model}/{case}/{what}" for model, case in CELLS for what in ("logits", "gradients")
    }


@pytest.mark.parametrize(("model", "case"), CELLS)
def test_composed_adapters_are_adapter_hubs(model: str, case: str, package: dict[str, Tensor]) -> None:
    base, config = base_named(model), config_of(case)
    its = method_of(config)
    seen.SEEN.comparing(its.kind, case, base, "adapters")
    tensors = {
        name: nudged(name, adapter_value(name, shape, model)) for name, shape in its.shapes(config, base).items()
    }
    delta = its.load(config, base, tensors).eval()
    with base.bind(delta):
        logits = packed_logits(base, rows(model))
        sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()  # type: ignore[union-attr]
    assert_as_in_package(base, delta, logits, package, f"{model}/{case}", rows(model))
