"""What one type of PEFT's is to us, both ways, and what all its configs share.

A key that is known to change nothing at inference is passed over; any other that we do not read must be null, false or
empty: an older reader drops such keys with a warning and computes something else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Problem
from tritune.exchange.format import Incoming
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig

#: version whose keys are written
WRITTEN_FOR = "0.18.0"
#: keys of every config that say nothing about the computation
COMMON = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)


class Codec(ABC):
    """One or more of PEFT's types and the method that they are."""

    types: ClassVar[tuple[str, ...]]
    Config: ClassVar[type[MethodConfig]]

    @abstractmethod
    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Config keys beside the common ones, and tensors by PEFT's names."""

    @abstractmethod
    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, where: str) -> Incoming:
        """
        Raises:
            Mismatch: with everything that does not fit.
        """


def common(base: Base) -> dict[str, Any]:
    """The keys of every config."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "peft_version": WRITTEN_FOR,
        "revision": None,
        "task_type": "CAUSAL_LM",
    }


def key_problems(config: Mapping[str, Any], read: Collection[str], idle: Collection[str]) -> list[Problem]:
    """Keys that are set and that we do not act on, and a task that is not ours.

    Args:
        read: keys that the codec reads.
        idle: keys that change nothing at inference.
    """
    found = [
        Problem(f"config key '{key}'", f"is {value!r}, which tritune does not know to compute")
        for key, value in config.items()
        if key not in COMMON and key not in read and key not in idle and value not in (None, False, "", [], {})
    ]
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        found.append(Problem("config key 'task_type'", f"is {config['task_type']!r}, expected 'CAUSAL_LM'"))
    return found
