"""What a task is: examples -> prompts -> scores. Text only: knows no tokenizer, no model, no mean over examples. No torch.

Task.examples(split) -> Example      a row of the user's data, and where it came from
Task.prompt(example) -> Prompt       the text before the answer, the right answer, and what may be answered
Task.score(example, Answer)          numbers for this one example
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tritune.spec import Frozen


class Split(StrEnum):
    TRAIN = "train"
    DEV = "dev"
    TEST = "test"


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `where` names file and line for error messages; `id` is stable over runs and machines."""

    id: str
    where: str
    fields: Mapping[str, str]
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """`context` is read, `target` is learned. With `choices`, the answer is the likeliest of them (index order kept).

    `target` and `choices` carry their own leading space, so that context + target is the whole text. `pieces` are the
    same context in parts, each with whether special tokens in it are meant (a chat template's own text) or are just
    text; empty: all of it is just text.
    """

    context: str
    target: str | None = None
    choices: tuple[str, ...] = ()
    pieces: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model answered: the chosen or generated text, and for choices the log-likelihood of each."""

    text: str
    log_likelihoods: tuple[float, ...] = field(default=())


class TaskSpec(Frozen):
    """What an adaptation must remember of its task to be used later (labels, template, field names)."""

    kind: str


class Task(ABC):
    """One kind of work. Subclasses: one file per kind."""

    #: name of the score that comparisons are made on; higher is better
    metric: str

    @property
    @abstractmethod
    def spec(self) -> TaskSpec:
        """The document stored with every adaptation."""

    @abstractmethod
    def examples(self, split: Split) -> Sequence[Example]:
        """All rows of a split, in file order. May be empty only for a split that was not given."""

    @abstractmethod
    def prompt(self, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """Text for one example, with `shots` solved in front of it (few-shot prompting)."""

    @abstractmethod
    def score(self, example: Example, answer: Answer) -> Mapping[str, float]:
        """Scores of this one example, `metric` among them.

        Raises:
            ValueError: the example has no label.
        """

    @property
    @abstractmethod
    def answers(self) -> tuple[str, ...]:
        """Labels in the order of `Prompt.choices`; empty where answers are free text."""

    @abstractmethod
    def unlabelled(self, source: Any) -> Sequence[Example]:
        """Rows to be answered: texts, mappings, or a file."""

    @abstractmethod
    def bind_chat(self, chat: Callable[[Sequence[Any]], str]) -> None:
        """Take the base's own way of writing a conversation, for templates that want it."""

    @abstractmethod
    def shots(self, k: int, seed: int = 0) -> Sequence[Example]:
        """`k` training examples to show in front of a prompt, drawn by the seed."""

    @abstractmethod
    def label_of(self, answer: Answer) -> str | None:
        """The label that an answer stands for; None where it stands for none."""

    @abstractmethod
    def shown(self, example: Example) -> str:
        """The text of an example as a report shows it."""

    def describe(self) -> Mapping[str, Any]:
        """Facts for the report: rows per split, labels and their counts, sources, license notes."""
        return {}
