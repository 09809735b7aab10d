"""What both sides of the comparison of stacked and fused adapters share: cases and weights.

Models are those of `adapter_hub.py`; LIVE and RECORDED mean what they mean there.
Read by `record_adapter_hub_composed.py` in an environment with the `adapters` package and by
`test_adapter_hub_composed.py` in ours; knows neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

Adapter = tuple[str, Mapping[str, Any]]

_SEQ: Adapter = ("seq_bn", {"reduction_factor": 4.0})
_WIDE: Adapter = ("seq_bn", {"reduction_factor": 2.0, "non_linearity": "gelu", "scaling": "learned"})
_DOUBLE: Adapter = ("double_seq_bn", {"reduction_factor": 4.0})
_DOUBLE_WIDE: Adapter = ("double_seq_bn", {"reduction_factor": 2.0, "ln_before": True})
_ATTENTION: Adapter = ("double_seq_bn", {"output_adapter": False, "original_ln_before": True, "reduction_factor": 4.0})

#: No stack with a parallel adapter: theirs forgets the sub-layer's own output, or the adapter in front of it.
#: name -> how, the adapters in their order, adapter-hub's fusion config
CASES: Mapping[str, tuple[str, tuple[Adapter, ...], str | None]] = {
    "stack of two": ("stack", (_SEQ, _WIDE), None),
    "stack of different places": ("stack", (_DOUBLE, _SEQ, _DOUBLE_WIDE), None),
    "fusion": ("fuse", (_SEQ, _WIDE), "dynamic"),
    "fusion without values": ("fuse", (_SEQ, _WIDE), "static"),
    "fusion behind attention on the whole stream": ("fuse", (_ATTENTION, _ATTENTION), "dynamic"),
    "fusion of three at both blocks": ("fuse", (_DOUBLE, _DOUBLE_WIDE, _DOUBLE), "dynamic"),
}
REAL = "smollm2-135m"  # as there; each side imports that file by another name

#: models that see all cases where the package can run
LIVE = ("llama", "mistral", "gpt2", "qwen2", "gpt-neox", "opt-post-norm", REAL)
#: model -> the cases that are recorded of it
RECORDED: Mapping[str, tuple[str, ...]] = {
    **{name: tuple(CASES) for name in ("llama", "gpt2", "qwen2")},
    "opt-post-norm": tuple(
        name for name, (how, parts, _) in CASES.items() if how == "stack" or parts == (_ATTENTION, _ATTENTION)
    ),
}


def case_on(model: str, case: str) -> tuple[str, tuple[Adapter, ...], str | None]:
    """A case as it is on this model.

    On the packaged base, fusion has three layers, as in the tiny models. With all thirty there are some where the gradient of
    queries and keys all but cancels: there, float32 is up to 2e-3 away from float64 in the package as here.
    """
    how, parts, fusion = CASES[case]
    if model == REAL and how == "fuse":
        away = [layer for layer in range(30) if layer not in (9, 19, 29)]
        parts = tuple((preset, {**changes, "leave_out": away}) for preset, changes in parts)
    return how, parts, fusion


def nudged(name: str, drawn: torch.Tensor, model: str) -> torch.Tensor:
    """A weight by our name, from what is drawn for it: values near the identity; queries and keys of the packaged base small,
    since its stream has numbers in the thousands, and no softmax should be all ones and zeros; all others as they are."""
    if name.endswith("value.weight"):
        return drawn + torch.eye(len(drawn))
    return drawn * 0.01 if model == REAL and re.search(r"\.(query|key)\.", name) else drawn
