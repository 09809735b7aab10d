"""Examples in, judged answers out: where a task's text meets a base's numbers.

Knows tasks, encoders and a base with whatever edits are bound to it; no method, no statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tritune.evaluate.answer import choice_log_likelihoods
from tritune.evaluate.record import ExampleResult
from tritune.models.pretrained import Base
from tritune.tasks.base import Answer, Example, Task
from tritune.text.encode import Encoded, Encoder


@dataclass(frozen=True, slots=True)
class Rows:
    """Examples and their ids, side by side."""

    examples: tuple[Example, ...]
    encoded: tuple[Encoded, ...]


def encode(task: Task, examples: Sequence[Example], encoder: Encoder, shots: Sequence[Example] = ()) -> Rows:
    """Prompts of all examples as ids.

    Raises:
        BadData: every row that is too long or whose answer cannot be learned.
    """
    task.bind_chat(encoder.chat)
    prompts = [task.prompt(example, shots) for example in examples]
    encoded = encoder.encode(prompts, [e.id for e in examples], [e.where for e in examples])
    return Rows(tuple(examples), tuple(encoded))


def answer(
    base: Base,
    task: Task,
    rows: Rows,
    *,
    slots: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """What the base, as it is bound now, answers to every row."""
    scored = choice_log_likelihoods(base, rows.encoded, slots=slots, progress=progress)
    choices = [task.prompt(example).choices for example in rows.examples[:1]]
    return [Answer(choices[0][max(range(len(ll)), key=ll.__getitem__)].strip(), ll) for ll in scored]


def judge(task: Task, rows: Rows, answers: Sequence[Answer]) -> list[ExampleResult]:
    """Each answer with its score on the task's own metric."""
    return [
        ExampleResult(
            id=example.id,
            text=task.shown(example),
            gold=example.label or "",
            predicted=task.label_of(given) or given.text,
            score=task.score(example, given)[task.metric],
            log_likelihoods=given.log_likelihoods,
        )
        for example, given in zip(rows.examples, answers, strict=True)
    ]


def mean_loss(rows: Rows, answers: Sequence[Answer]) -> float:
    """Mean negative log-likelihood of the right answers, in nats per row."""
    losses = [
        -given.log_likelihoods[row.gold]
        for row, given in zip(rows.encoded, answers, strict=True)
        if row.gold is not None
    ]
    return sum(losses) / len(losses)
