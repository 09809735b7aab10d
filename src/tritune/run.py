"""A run: everything that can change a result, as one document. Recipes are defaults plus differences. No torch.

Run = base + task + method + training + seed;  Run.fingerprint() names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer

from tritune.spec import Digests, Frozen, Given, MethodConfig, Quantisation, digest
from tritune.tasks.base import TaskSpec


class Training(Given):
    """How long, how fast and on how much at a time. The same document for every method.

    epochs: passes over the training rows; may be a fraction.
    learning_rate: peak rate of AdamW; null: the method's own default.
    schedule: what follows the warm-up: "linear" or "cosine" decay to zero, or "constant".
    warmup: share of all steps in which the rate rises linearly from zero.
    weight_decay: of AdamW, decoupled.
    clip: largest global gradient norm; null: no clipping.
    batch_tokens: tokens of the rows that are learned together (one micro-batch), and of a pass through the base: where
        virtual tokens behind texts make them more, a micro-batch goes in several passes.
    accumulate: micro-batches per optimizer step.
    evaluations: how often dev is scored over the whole run, evenly spaced, the last step included; 0: never.
    patience: stop after so many evaluations in a row without a new best; null: never.
    """

    epochs: float = Field(default=3.0, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = Field(default=0.06, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    batch_tokens: int = Field(default=512, ge=1)
    accumulate: int = Field(default=1, ge=1)
    evaluations: int = Field(default=4, ge=0)
    patience: int | None = Field(default=None, ge=1)


class BaseRef(Frozen):
    """A base by name and by content, the number format it computed in, and the form its weights were kept in.

    The digests are of the weights before they were quantised.
    """

    name: str
    digests: Digests
    dtype: Literal["float32", "bfloat16"]
    quantised: Quantisation | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Where nothing is quantised it is left out: what was stored before there was this field keeps its name."""
        document: dict[str, Any] = write(self)
        return {key: value for key, value in document.items() if key != "quantised" or value is not None}


class Run(Frozen):
    """One adaptation of one base on one task: what `run.yaml` of a run folder holds."""

    base: BaseRef
    task: SerializeAsAny[TaskSpec]
    chat_template: str | None = None  # digest of the base's own, where it writes the task's prompts
    data: Mapping[str, str]  # digest of the rows of each split
    method: str
    config: SerializeAsAny[MethodConfig]
    training: Training
    seed: int

    def fingerprint(self) -> str:
        """sha256 of everything that can change the result."""
        return digest(self)
