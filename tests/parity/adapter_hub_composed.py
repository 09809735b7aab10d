"""What both sides of the comparison of stacked and fused adapters share: cases and weights.

Models are those of `adapter_hub.py`; LIVE and RECORDED mean what they mean there.
Read by `record_adapter_hub_composed.py` in an environment with the `adapters` package and by
`test_adapter_hub_composed.py` in ours; knows neither.
"""

from __future__ import annotations

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
_STACKS = tuple(name for name, (how, _, _) in CASES.items() if how == "stack")
#: model -> the cases that it sees where the package can run; the real one has its name from `adapter_hub.py`
LIVE: Mapping[str, tuple[str, ...]] = {
    **{name: tuple(CASES) for name in ("llama", "mistral", "gpt2", "qwen2", "gpt-neox", "opt-post-norm")},
    # No fusion yet: gradients of queries and keys nearly cancel at saturated tokens there, and float32 is up to 2e-3 away
    # from float64 in the package as here.
    "smollm2-135m": _STACKS,
}
#: model -> the cases that are recorded of it
RECORDED: Mapping[str, tuple[str, ...]] = {
    **{name: tuple(CASES) for name in ("llama", "gpt2", "qwen2")},
    "opt-post-norm": tuple(
        name for name, (how, parts, _) in CASES.items() if how == "stack" or parts == (_ATTENTION, _ATTENTION)
    ),
}


def nudged(name: str, drawn: torch.Tensor) -> torch.Tensor:
    """A weight by our name, from what is drawn for it: values near the identity, all others as they are."""
    return drawn + torch.eye(len(drawn)) if name.endswith("value.weight") else drawn
