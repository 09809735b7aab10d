"""Full fine-tuning, of everything or of parts, against autograd on a model of transformers: the same changed weights give the
same logits and gradients, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.oracles import base_of, stock_logits
from tests.parity.seen import SEEN
from tests.parity.test_peft import REAL, assert_close, assert_gradients_close, bare, move, ours, slopes, theirs
from tritune.methods.full import METHOD, Full

CASES = {
    "everything": Full(),
    "layers": Full(parts=("layers",)),
    "the last layers and what is behind them": Full(top_layers=2),
    "norms": Full(parts=("norms",)),
    "norms of the last layers, pulled back": Full(parts=("norms",), top_layers=2, l2_sp=100.0),
    "embeddings": Full(parts=("embeddings",)),
    "biases": Full(parts=("bias",)),
    "the head": Full(parts=("head",)),
}
FAMILIES = ("llama-tied", "qwen2", "gemma2", "gpt2", "gpt-neox", "opt-post-norm")
#: the only bases that have such weights, of their own
ONLY = {
    "biases": ("qwen2", "gpt2", "gpt-neox", "opt", "opt-post-norm"),
    "the head": ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt-neox"),
}


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for case in CASES for name in ONLY.get(case, (REAL, *FAMILIES))]
)
def test_logits_and_gradients_are_those_of_transformers(name: str, case: str) -> None:
    base, config = base_of(name), CASES[case]
    SEEN.comparing("full", case, base, "transformers")
    # on the real base little is enough: all of its weights move at once
    delta = move(METHOD.init(config, base, torch.Generator()), 0.1 if name != REAL else 0.001)
    model = oracles.stock(base)
    trained = {n: p for n, p in model.named_parameters() if n in delta.trainable()}
    before = {n: p.detach().clone() for n, p in trained.items()}
    with torch.no_grad():
        for tensor_name, parameter in delta.trainable().items():
            trained[tensor_name].copy_(parameter)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    wanted = theirs(lambda row: stock_logits(model, row))
    got, gradients = ours(base, delta)
    assert_close(got, wanted, bare(name))
    penalty = delta.penalty()
    if penalty is not None:
        penalty.backward()  # type: ignore[no-untyped-call]
        distance = torch.stack([(p - before[n]).square().sum() for n, p in trained.items()]).sum()
        (config.l2_sp / 2 * distance).backward()  # type: ignore[no-untyped-call]
    found = slopes(trained)
    assert_gradients_close(*(without_keys_biases(name, g) for g in (gradients, found)))


def without_keys_biases(name: str, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """OPT's keys move by their bias all alike, and their shares of attention do not: rounding is all there is to compare."""
    idle = {n for n in gradients if n.endswith("k_proj.bias")} if name.startswith("opt") else set()
    assert all(float(gradients[n].abs().max()) < 1e-2 for n in idle)
    return {n: gradient for n, gradient in gradients.items() if n not in idle}
