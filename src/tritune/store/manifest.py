"""The manifest of an adaptation: what it is, what it belongs to, and what else it refuses.

An adaptation is a folder named by the digest of its manifest, which holds the digests of its files. Knows documents and
digests; no tensors, no model.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from tritune.errors import Problem
from tritune.run import BaseRef, Training
from tritune.spec import Digests, Frozen, Strategy, digest

FORMAT = 1


class Manifest(Frozen):
    """`files`: sha256 of every other file in the folder. `config` and `task` are documents of the method and task."""

    format: int = Field(default=FORMAT, ge=1)
    method: str
    strategy: Strategy
    config: Mapping[str, object]
    base: BaseRef
    task: Mapping[str, object]
    template: str  # digest of the prompt template: answers are only meant for prompts of this form
    chat_template: str | None = None  # digest of the base's own, where it writes the prompts
    files: Mapping[str, str]
    tensors: Mapping[str, tuple[int, ...]]
    training: Training
    learning_rate: float
    seed: int
    steps: int
    data: Mapping[str, str] = {}
    made: Mapping[str, object] | None = None  # of which adaptations it was put together, and how

    def id(self) -> str:
        """Content hash: of everything in here, and through `files` of every byte of the adaptation."""
        # Where they play no part they are left out: what was stored before they were known keeps its name.
        absent = {name for name in ("chat_template", "made") if getattr(self, name) is None}
        return digest(self.model_dump(mode="json", exclude=absent))


def base_misfits(manifest: Manifest, name: str, digests: Digests) -> list[Problem]:
    """How a base differs from the one an adaptation was trained on."""
    return ref_misfits(manifest.base, name, digests)


def ref_misfits(wanted: BaseRef, name: str, digests: Digests) -> list[Problem]:
    """How a base differs from the one that is wanted."""
    parts = (
        ("weights", wanted.digests.weights, digests.weights),
        ("config", wanted.digests.config, digests.config),
        ("tokenizer", wanted.digests.tokenizer, digests.tokenizer),
    )
    return [
        Problem(f"{part} of the base", f"digest {found[:12]} of {name}, expected {want[:12]} of {wanted.name}")
        for part, want, found in parts
        if want != found
    ]
