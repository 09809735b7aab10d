"""What an exchange format is: an adaptation goes out into a folder, a folder comes in as a method's config and tensors.

Knows adaptations and folders; how a written folder is checked and published is `outward.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.errors import Mismatch
from tritune.models.load import Base
from tritune.spec import MethodConfig

#: scripts that run the reference libraries, each in a process of its own
SCRIPTS = Path(__file__).parent / "reference"


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a foreign folder holds, in our words. `notes`: what was rewritten to say the same, a sentence each."""

    config: MethodConfig
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


class Format(ABC):
    """One format. Stateless."""

    name: ClassVar[str]
    #: package that reads the format independently of us, and the script that lets it answer
    reference: ClassVar[str]
    script: ClassVar[str]

    @abstractmethod
    def write(self, adaptation: Adaptation, folder: Path) -> None:
        """Fill an empty folder.

        Raises:
            Mismatch: this adaptation has no exact form there; says why.
            NotMergeable: the format holds whole bases, and the method cannot become one.
        """

    def recognises(self, folder: Path) -> bool:
        """Whether a folder is in this format."""
        return False

    def base_name(self, folder: Path) -> str | None:
        """What a folder calls its base, if it does."""
        return None

    def read(self, folder: Path, base: Base) -> Incoming:
        """What a folder holds.

        Raises:
            Mismatch: with every key, tensor and shape that does not fit.
        """
        raise Mismatch(f"The format '{self.name}' is only written, not read.")
