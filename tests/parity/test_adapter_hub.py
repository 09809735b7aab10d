"""Bottleneck adapters and LoRA against adapter-hub's own package, run in its own environment: logits and gradients.

Live where TRITUNE_ADAPTERS_PYTHON names a Python that has the package, as in `make parity`; else part of it, as recorded
(`record_adapter_hub.py`). Live, every option that both have is compared on SmolLM2-135M, on a tiny Llama and on four more
families or five, one of them post-norm, wherever it means something there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.oracles import base_of, packed_logits
from tests.parity import seen
from tests.parity.adapter_hub import LIVE, MODELS, REAL, RECORDED, adapter_value, base_value, case_on, rows, weights
from tritune.errors import Mismatch
from tritune.exchange.adapter_hub.older import with_older_config
from tritune.methods import method_of
from tritune.methods.base import Delta
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.lora import LoRA
from tritune.models.base import NoEdits, Role
from tritune.models.pretrained import Base
from tritune.models.probe import probe
from tritune.models.tiny import byte_tokenizer
from tritune.spec import Digests, MethodConfig

RECORDING = Path(__file__).with_name("adapter_hub.safetensors")
PYTHON = os.environ.get("TRITUNE_ADAPTERS_PYTHON")
CELLS = [(model, case) for model, cases in (LIVE if PYTHON else RECORDED).items() for case in cases]


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the package computes: now, where a Python that has it is named; else as it was recorded."""
    if PYTHON is None:
        return load_file(RECORDING)
    return computed_live(PYTHON, "record_adapter_hub.py", tmp_path_factory)


def computed_live(python: str, script: str, folders: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the package computes in a script of this folder, the packaged base among the models."""
    out, located = folders.mktemp("package") / "live.safetensors", base_of(REAL).located
    assert located is not None
    base = with_older_config(located.folder, folders.mktemp("base"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([python, str(RECORDING.with_name(script)), str(out), str(base)], check=True, env=environment)
    return load_file(out)


@cache
def base_named(name: str) -> Base:
    if name == REAL:
        return base_of(name)
    kind, options = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager")  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(base_value(parameter_name, tuple(parameter.shape)))
    base = Base(model, byte_tokenizer(), name, Digests(weights=name, config=name, tokenizer=name))
    probe(base)
    return base


def config_of(model: str, case: str) -> MethodConfig:
    """adapter-hub's options in our words."""
    preset, changes = case_on(model, case)
    if preset == "lora":
        attention = (f"attn.{letter}" for letter in changes.get("attn_matrices", "qv"))
        roles = (*attention, "mlp.up", "mlp.down") if changes.get("output_lora") else (*attention,)
        return LoRA(rank=changes["r"], alpha=changes["alpha"], roles=tuple(map(Role, roles)))
    return own_config(preset, changes)


def own_config(preset: str, changes: Mapping[str, Any]) -> Bottleneck:
    """Of a bottleneck preset."""
    own: dict[str, Any] = dict(changes)
    if "non_linearity" in own:
        own["nonlinearity"] = own.pop("non_linearity")
    if own.pop("output_adapter", None) is False:
        own["blocks"] = ("attn",)
    own["leave_out"] = tuple(own.pop("leave_out", ()))
    return Bottleneck(preset=preset, **own)  # type: ignore[arg-type]


def test_the_recording_is_of_these_cases(package: dict[str, Tensor]) -> None:
    cells = [(model, case) for model, cases in RECORDED.items() for case in cases]
    recorded = load_file(RECORDING)
    assert set(recorded) == {f"{model}/{case}/{what}" for model, case in cells for what in ("logits", "gradients")}
    for name, tensor in recorded.items():  # and the package still computes it
        torch.testing.assert_close(package[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))


def assert_as_in_package(
    base: Base, delta: Delta, logits: Sequence[Tensor], package: Mapping[str, Tensor], cell: str, given: list[list[int]]
) -> None:
    """Logits, and gradients that are there already, within 1e-4 of the largest number of the package's own; of gradients, of
    each tensor's own."""
    with torch.no_grad(), base.bind(NoEdits()):
        bare = torch.cat(packed_logits(base, given))
    wanted = package[f"{cell}/logits"]
    assert not torch.allclose(bare, wanted, atol=1e-2), "the adapters make a difference"
    gap = seen.SEEN.note([torch.cat([*logits])], [wanted])
    seen.SEEN.note_variant(logits=gap)
    assert gap < 1e-4
    trained = delta.trainable()
    sizes = [trained[name].numel() for name in sorted(trained)]
    recorded = package[f"{cell}/gradients"]
    assert sum(sizes) == len(recorded), "as many numbers as adapter-hub trains"
    assert float(recorded.abs().max()) > 0.1
    ours = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
    assert ours.keys() == trained.keys()
    package_own = seen.as_vectors(dict(zip(sorted(trained), recorded.split(sizes), strict=True)))  # type: ignore[no-untyped-call]
    for name, gradient in seen.as_vectors(ours).items():
        theirs = package_own[name]
        if not theirs.any():  # behind relu, a narrow adapter may have nothing to learn
            assert not gradient.any(), name
            continue
        gap = seen.SEEN.note([gradient.flatten()], [theirs])
        seen.SEEN.note_variant(gradients=gap)
        assert gap < 1e-4, name


@pytest.mark.parametrize(("model", "case"), CELLS)
def test_we_compute_what_adapter_hub_does(model: str, case: str, package: dict[str, Tensor]) -> None:
    base, config = base_named(model), config_of(model, case)
    method = method_of(config)
    seen.SEEN.comparing(method.kind, case, base, "adapters")
    tensors = {name: adapter_value(name, shape, model) for name, shape in method.shapes(config, base).items()}
    delta = method.load(config, base, tensors).eval()
    with base.bind(delta):
        logits = packed_logits(base, rows(model))
        sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()  # type: ignore[union-attr]
    assert_as_in_package(base, delta, logits, package, f"{model}/{case}", rows(model))


def test_presets_are_filled_in_and_may_be_changed() -> None:
    config = Bottleneck(preset="scaled_par_bn", reduction_factor=4.0)
    assert (config.placement, config.scaling, config.reduction_factor, config.init) == ("par", "learned", 4.0, "zero")
    assert Bottleneck.read(config.model_dump(mode="json"), "here") == config
    assert Bottleneck(preset="seq_bn").reduction_factor == 16.0
    with pytest.raises(Mismatch, match="preset"):
        Bottleneck.read({"preset": "houlsby"}, "here")


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"placement": "par", "residual_before_ln": False}, "residual_before_ln"),
        ({"placement": "par", "original_ln_before": True}, "original_ln_before"),
        ({"placement": "double_seq", "residual_before_ln": "post_add"}, "goes with original_ln_before"),
        ({"reduction_factor": {"first": 2.0}}, "'first'"),
        ({"reduction_factor": {"0": 0.0}}, "greater than 0"),
        ({"reduction_factor": -1.0}, "greater than 0"),
        ({"blocks": []}, "blocks"),
        ({"scaling": "4"}, "scaling"),
    ],
)
def test_options_that_mean_nothing_are_refused(document: dict[str, object], said: str) -> None:
    with pytest.raises(Mismatch, match=said):
        Bottleneck.read(document, "here")


def test_what_does_not_fit_the_base_is_listed_at_once() -> None:
    base = base_named("llama")
    config = Bottleneck(reduction_factor={"0": 2.0, "7": 2.0}, leave_out=(1, 9), residual_before_ln="post_add")
    with pytest.raises(Mismatch) as caught:
        config.sites(base)
    places = [problem.where for problem in caught.value.problems]
    assert places == [
        "leave_out, layer 9", "reduction_factor, layer 7", "reduction_factor, layer 2", "residual_before_ln",
    ]  # fmt: skip
    with pytest.raises(Mismatch, match="no layer with an adapter"):
        Bottleneck(leave_out=(0, 1, 2)).sites(base)
    with pytest.raises(Mismatch, match="norms after the sum"):
        Bottleneck(original_ln_after=False).sites(base_named("opt-post-norm"))
