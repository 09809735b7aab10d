"""What one architecture of adapter-hub's is to us, both ways.

Every key of its configs is read, known to change nothing at inference, or must have the value that says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Problem
from tritune.exchange.format import Incoming
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig

#: the adapter's name is part of every tensor's name there; ours have none
NAME = "tritune"
#: families that adapter-hub patches by hand and that are among ours
FAMILIES = ("llama", "mistral", "gpt2")


class Codec(ABC):
    """One architecture and the method that it is."""

    architecture: ClassVar[str | None]
    Config: ClassVar[type[MethodConfig]]

    @abstractmethod
    def encode(self, adaptation: Adaptation) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """
        Raises:
            Mismatch: it has no exact form there.
        """

    @abstractmethod
    def misfits(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> list[Problem]:
        """Everything that does not fit. `name`: the adapter's, as in the tensors' names."""

    @abstractmethod
    def decode(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, name: str) -> Incoming:
        """What fits, in our words."""


def setting_problems(config: Mapping[str, Any], read: set[str], neutral: Mapping[str, Any]) -> list[Problem]:
    """Keys that we do not act on and that are set.

    Args:
        read: keys that the codec reads, or that change nothing at inference.
        neutral: the value that changes nothing, by key; of other keys null, false or empty.
    """
    return [
        Problem(f"config.{key}", f"is {value!r}, which tritune does not know to compute")
        for key, value in config.items()
        if key not in read and value != neutral.get(key) and value not in (None, False, "", [], {})
    ]
