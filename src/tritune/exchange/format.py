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
from tritune.errors import Mismatch, NotMergeable, TrituneError
from tritune.methods import method_of
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig

#: scripts that run the reference libraries, each in a process of its own
SCRIPTS = Path(__file__).parent / "reference"


#: what float32 sums in another order may differ by, as a share of the largest logit
ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a foreign folder holds, in our words. `notes`: what was rewritten to say the same, a sentence each."""

    config: MethodConfig
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


class Absent(TrituneError):
    """What the reference library needs is not there, itself included; nothing was compared."""


class Format(ABC):
    """One format. Stateless."""

    name: ClassVar[str]
    #: package that reads the format independently of us, and the script that lets it answer
    reference: ClassVar[str]
    script: ClassVar[str]
    #: whether a whole model is written: its weights are then those that were computed with, dequantised where they were
    #: codes. Else the adaptation is for the base's own weights, which other packages load and quantise as they are told.
    whole: ClassVar[bool] = False

    def check(self, config: MethodConfig) -> None:
        """What needs no base: whether such an adaptation has a place in the format at all.

        Raises:
            Mismatch, NotMergeable: as `write`.
        """
        if self.whole and (reason := method_of(config).unmergeable(config)):
            raise NotMergeable(reason)

    @abstractmethod
    def write(self, adaptation: Adaptation, folder: Path) -> None:
        """Fill an empty folder.

        Raises:
            Mismatch: this adaptation has no exact form there; says why.
            NotMergeable: the format holds whole bases, and the method cannot become one.
        """

    def bound(self, base: Base) -> float:
        """Largest difference of logits that counts as equal, as a share of the largest logit; both sides in float32."""
        return ROUNDING

    def for_reference(self, folder: Path, base: Base, base_folder: Path, scratch: Path) -> tuple[Path, Path]:
        """The exchanged folder and the base as the reference takes them.

        Args:
            base_folder: the base as a Hugging Face folder.
            scratch: an empty folder for what has to be made for it.

        Raises:
            Absent: the reference needs the base in a form that is not there.
        """
        return folder, base_folder

    @property
    def readable(self) -> bool:
        """Whether a folder in this format can be read, be it only to check it."""
        return type(self).read is not Format.read

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
