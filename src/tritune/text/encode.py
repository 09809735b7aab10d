"""The one place where token ids and labels are born. Trainer, evaluation and predictions all come through here.

A context and its possible answers become ids here, and so does the rule of what is learned: every token of the answer
and none of the context. Special-token text inside user data stays plain text. Knows a tokenizer; no model, no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

from jinja2 import TemplateError

from tritune.errors import BadData, Mismatch, Problem
from tritune.tasks.base import Prompt
from tritune.text.conversation import Conversations, Pieces
from tritune.text.template import Message

#: characters before an answer that decide how the answer is cut into tokens
_TAIL = 24


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: object

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool
    ) -> dict[str, list[list[int]]]: ...

    def apply_chat_template(self, *args: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as ids. `target` follows `context`; `choices` are all answers that may be given, `gold` the right one."""

    id: str
    context: tuple[int, ...]
    target: tuple[int, ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()
    gold: int | None = None

    @property
    def n_trained(self) -> int:
        """Packed tokens of this row in training; the answer's last token is only predicted, never read."""
        return len(self.context) + len(self.target) - 1


class Encoder:
    """Turns prompts into ids.

    Args:
        limit: most tokens a row may have, answer included. Longer rows are refused, never cut.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._bos = _adds_bos(tokenizer)
        self._conversations = Conversations(tokenizer, lambda text: self._plain([text])[0])
        self._answers = lru_cache(maxsize=4096)(self._answer_ids)

    def chat(self, messages: Sequence[Message]) -> str:
        """A conversation in the base's own words, up to where the assistant answers.

        Raises:
            Mismatch: this base has no chat template, or it refuses this conversation.
        """
        if self._tokenizer.chat_template is None:
            raise Mismatch("This base has no chat template.", hint="Use a prompt template of kind 'jinja'.")
        turns = [dict(message) for message in messages]
        try:
            written: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError) as error:
            raise Mismatch(
                "This base's chat template cannot write the prompts.",
                [Problem("chat template", str(error))],
                "Use a prompt template of kind 'jinja'.",
            ) from error
        return written

    def encode(self, prompts: Sequence[Prompt], ids: Sequence[str], where: Sequence[str]) -> list[Encoded]:
        """Ids of every prompt.

        Raises:
            BadData: listing every row that is too long, has nothing to learn, or whose answer is no run of tokens.
        """
        contexts = iter(self._plain([prompt.context for prompt in prompts if not prompt.pieces]))
        problems: list[Problem] = []
        rows = []
        for prompt, row_id, place in zip(prompts, ids, where, strict=True):
            try:
                context = self._conversations.ids(prompt.pieces) if prompt.pieces else next(contexts)
                row = self._row(prompt, context, row_id)
            except ValueError as error:
                problems.append(Problem(place, str(error)))
                continue
            rows.append(row)
            longest = len(row.context) + max(map(len, (row.target, *row.choices)))
            if longest > self._limit:
                problems.append(Problem(place, f"is {longest} tokens long, the limit is {self._limit}"))
        BadData.check("Some rows cannot be used.", problems, "Shorten or remove these rows; nothing is cut in silence.")
        return rows

    def _row(self, prompt: Prompt, context: Sequence[int], row_id: str) -> Encoded:
        if not context:
            raise ValueError("has an empty prompt")
        written = tuple(context[: len(self._bos)]) == self._bos  # chat templates write the start token themselves
        context = tuple(context) if written else (*self._bos, *context)
        tail = _tail(prompt)
        choices = self._prefix_free(self._answers(tail, prompt.choices))
        if prompt.target is None:
            return Encoded(row_id, context, (), choices)
        gold = prompt.choices.index(prompt.target) if prompt.choices else None
        target = self._answers(tail, (prompt.target,))[0] if gold is None else choices[gold]
        return Encoded(row_id, context, target, choices, gold)

    def _answer_ids(self, tail: Pieces, answers: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Ids of answers as they stand behind a context that ends with `tail`."""
        before, *wholes = self._texts([tail, *((*tail, (answer, False)) for answer in answers)])
        for answer, whole in zip(answers, wholes, strict=True):
            if whole[: len(before)] != before or len(whole) == len(before):
                raise ValueError(
                    f"the answer {answer!r} is not a run of tokens behind {''.join(text for text, _ in tail)!r}: "
                    "let the template end without a space and the answer begin with one"
                )
        return tuple(tuple(whole[len(before) :]) for whole in wholes)

    def _prefix_free(self, choices: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        """Where one answer is the beginning of another, an end token closes all: a longer one could never win otherwise."""
        alike = [(a, b) for a, b in pairwise(sorted(choices)) if b[: len(a)] == a]
        if any(a == b for a, b in alike):
            raise ValueError("two labels become the same tokens, so this base cannot tell them apart")
        if not alike:
            return choices
        end = self._tokenizer.eos_token_id
        if end is None:
            raise ValueError("one label is the beginning of another and the base has no end token to tell them apart")
        return tuple((*choice, end) for choice in choices)

    def _texts(self, texts: Sequence[Pieces]) -> list[list[int]]:
        if any(control for text in texts for _, control in text):
            return [self._conversations.ids(text) for text in texts]
        return self._plain(["".join(piece for piece, _ in text) for text in texts])

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """The text of a special token stays text."""
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _tail(prompt: Prompt) -> tuple[tuple[str, bool], ...]:
    """The end of a context that decides how an answer is cut; of a chat template's own text nothing is cut off."""
    tail: list[tuple[str, bool]] = []
    left = _TAIL
    for text, control in reversed(prompt.pieces or ((prompt.context, False),)):
        if left > 0:
            tail.append((text if control else text[-left:], control))
            left -= len(text)
    return tuple(reversed(tail))


def _adds_bos(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The start token, if this base's tokenizer puts one in front of every text by itself."""
    ids = tokenizer(["a"], add_special_tokens=True, split_special_tokens=True)["input_ids"][0]
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and ids[:1] == [bos] else ()
