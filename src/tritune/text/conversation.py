"""A conversation as ids: the whole text at once, as chat models were trained, yet nothing in a turn becomes a control token.

Cut into pieces that are tokenised apart, a text gives other ids: no merge reaches over a cut, and tokenizers of the
SentencePiece kind put a space in front of every piece. So the whole is read, and looked at: where the only control
tokens in it are those of the base's chat template, that is the answer. Where a turn's own text reads like one, the
stretches between the template's control tokens are read as plain text. Knows a tokenizer; no task, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from tritune.errors import Mismatch

#: parts of one text, each with whether its special tokens are meant
Pieces = Sequence[tuple[str, bool]]


class Control(NamedTuple):
    """A control token, and the characters that spell it (without white space that it swallows)."""

    token: int
    start: int
    end: int


class Conversations:
    """Conversations of one base -> ids.

    Args:
        plain: a text -> its ids, the text of special tokens read as text.
    """

    def __init__(self, tokenizer: Any, plain: Callable[[str], list[int]]) -> None:
        self._tokenizer = tokenizer
        self._plain = plain
        self._special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._of_template = lru_cache(maxsize=256)(lambda text: self._read(text)[1])
        self._cuts_alike = lru_cache(maxsize=256)(self._compare)

    def ids(self, pieces: Pieces) -> list[int]:
        """Ids of the text that the pieces make together, without any that the tokenizer would put around it.

        Raises:
            ValueError: a turn's text reads like a control token, and this tokenizer cannot read it otherwise here.
            Mismatch: this tokenizer does not tell where its tokens stand.
        """
        if not self._tokenizer.is_fast:
            raise Mismatch(
                "This base's tokenizer does not tell a chat template's control tokens from a text that looks like them.",
                hint="Use a prompt template of kind 'jinja'.",
            )
        text = "".join(piece for piece, _ in pieces)
        starts = accumulate((len(piece) for piece, _ in pieces), initial=0)
        meant = [
            Control(token, start + a, start + b)
            for (piece, control), start in zip(pieces, starts, strict=False)
            if control
            for token, a, b in self._of_template(piece)
        ]
        ids, found = self._read(text)
        return ids if found == meant else self._apart(text, meant)

    def _read(self, text: str) -> tuple[list[int], list[Control]]:
        """The ids of a text whose special tokens are all meant, and where these stand."""
        given = self._tokenizer(
            [text], add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True
        )
        ids: list[int] = given["input_ids"][0]
        found = []
        for token, (start, end) in zip(ids, given["offset_mapping"][0], strict=True):
            if token in self._special:
                spelled = self._special[token].content
                at = text.find(spelled, start, end)
                found.append(Control(token, start, end) if at < 0 else Control(token, at, at + len(spelled)))
        return ids, found

    def _apart(self, text: str, meant: Sequence[Control]) -> list[int]:
        """The template's control tokens, and between them nothing but text."""
        ids: list[int] = []
        for before, after in pairwise([None, *meant, None]):
            stretch = text[before.end if before else 0 : after.start if after else len(text)]
            if before and self._special[before.token].rstrip:
                stretch = stretch.lstrip()
            if after and self._special[after.token].lstrip:
                stretch = stretch.rstrip()
            if before:
                ids.append(before.token)
            if before and stretch and not self._cuts_alike(before.token, text[before.start : before.end], stretch[0]):
                raise ValueError(
                    "holds a control token of this base in a turn's own text, which its tokenizer cannot read as text "
                    "there; take it out, or use a template of kind 'jinja'"
                )
            ids += self._plain(stretch) if stretch else []
        return ids

    def _compare(self, token: int, spelled: str, first: str) -> bool:
        """Whether a text that begins with this character is read alone as behind the control token."""
        return self._read(spelled + first)[0] == [token, *self._plain(first)]
