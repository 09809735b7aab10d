"""Stored adaptations without a base or training: one tensor, and a manifest whose facts can be changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tritune.run import BaseRef, Training
from tritune.spec import Digests, Strategy
from tritune.store.manifest import Manifest

TENSOR = {"layers.0.attn.q.A": torch.arange(6.0).view(2, 3), "layers.0.attn.q.B": torch.ones(3, 2)}


def manifest(files: Mapping[str, str], **changed: Any) -> Manifest:
    facts: dict[str, Any] = {
        "method": "lora",
        "strategy": Strategy.ADAPTERS,
        "config": {"rank": 2},
        "base": BaseRef(name="tiny", digests=Digests(weights="w", config="c", tokenizer="t"), dtype="float32"),
        "task": {"kind": "classification"},
        "template": "digest",
        "files": files,
        "tensors": {"a": (2, 3)},
        "training": Training(),
        "learning_rate": 1e-3,
        "seed": 0,
        "steps": 5,
    }
    return Manifest(**{**facts, **changed})


def other(**changed: Any) -> Callable[[Mapping[str, str]], Manifest]:
    return lambda files: manifest(files, **changed)
