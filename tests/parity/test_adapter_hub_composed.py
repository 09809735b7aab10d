"""Stacked and fused bottleneck adapters against adapter-hub's own package, recorded in its environment: logits, gradients.

`record_adapter_hub_composed.py` says how the recording is made. Four families, one of them post-norm.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.oracles import packed_logits
from tests.parity import seen
from tests.parity.adapter_hub import adapter_value, rows, weights
from tests.parity.adapter_hub_composed import CASES, SEEN, nudged
from tests.parity.test_adapter_hub import base_named, own_config
from tritune.methods import method_of
from tritune.methods.fusion import Fusion
from tritune.methods.stack import Stack
from tritune.models.base import NoEdits

RECORDED = load_file(Path(__file__).with_name("adapter_hub_composed.safetensors"))
CELLS = [(model, case) for model, cases in SEEN.items() for case in cases]


def config_of(case: str) -> Stack | Fusion:
    how, parts, fusion = CASES[case]
    configs = tuple(own_config(*part) for part in parts)
    return Stack.of(configs) if how == "stack" else Fusion(parts=configs, value=fusion == "dynamic")


def test_the_recording_is_of_these_cases() -> None:
    assert set(RECORDED) == {f"{model}/{case}/{what}" for model, case in CELLS for what in ("logits", "gradients")}


@pytest.mark.parametrize(("model", "case"), CELLS)
def test_composed_adapters_are_adapter_hubs(model: str, case: str) -> None:
    base, config = base_named(model), config_of(case)
    its = method_of(config)
    tensors = {name: nudged(name, adapter_value(name, shape)) for name, shape in its.shapes(config, base).items()}
    delta = its.load(config, base, tensors).eval()
    with base.bind(delta):
        logits = packed_logits(base, rows())
        sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()  # type: ignore[union-attr]
    with torch.no_grad(), base.bind(NoEdits()):
        bare = torch.cat(packed_logits(base, rows()))
    wanted = RECORDED[f"{model}/{case}/logits"]
    assert not torch.allclose(bare, wanted, atol=1e-2), "the adapters make a difference"
    seen.SEEN.note([torch.cat(logits)], [wanted])
    torch.testing.assert_close(torch.cat(logits), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    trained = delta.trainable()
    sizes = [trained[name].numel() for name in sorted(trained)]
    recorded = RECORDED[f"{model}/{case}/gradients"]
    assert sum(sizes) == len(recorded), "as many numbers as adapter-hub trains, but for the bias of keys"
    for name, theirs in zip(sorted(trained), recorded.split(sizes), strict=True):
        gradient = trained[name].grad
        assert gradient is not None, name
        size = max(float(theirs.abs().max()), 1e-3)
        torch.testing.assert_close(
            gradient.flatten(),
            theirs,
            rtol=1e-4,
            atol=2e-4 * size,
            msg=lambda m, n=name: f"{n}: {m}",  # type: ignore[misc]
        )
