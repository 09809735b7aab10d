"""How much a base unlearned while it was adapted: the rise of its loss on general text that no task is about.

The text is the package's own (`general.json`): short sentences of general knowledge in English and Russian. A small one:
it shows that a base was damaged and how much more by one method than by another, not what exactly was lost. Knows a base
and edits; no task, no method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import torch

from tritune.models.base import IGNORE, Edits, NoEdits
from tritune.models.pretrained import Base
from tritune.tasks.base import Prompt
from tritune.text.encode import Encoded, Encoder
from tritune.text.pack import training_batch

#: sentences per forward pass: logits of a few hundred positions are held at once
TOGETHER = 12


class ForgettingProbe:
    """The general text as one base reads it, and its loss before anything was learned.

    Args:
        virtual: most virtual tokens that an adaptation puts in front of a row.

    Raises:
        BadData: the base has too few positions for a sentence behind so many.
    """

    def __init__(self, base: Base, virtual: int = 0) -> None:
        self.base = base
        encoder = Encoder(base.tokenizer, base.max_positions - virtual)
        self._rows = {language: _encoded(encoder, language, said) for language, said in general_text().items()}
        self.bare = self.loss(NoEdits())

    def rise(self, edits: Edits) -> float:
        """Loss under `edits` less the bare base's, in nats per token. Above 0: something was unlearned.

        The mean of both languages, each counted alike, however many tokens the base cuts it into.
        """
        return self.loss(edits) - self.bare

    @torch.no_grad()
    def loss(self, edits: Edits) -> float:
        """Mean negative log-likelihood per token, in nats, mean over languages. Each sentence's first word is given."""
        with self.base.bind(edits):
            means = [self._mean(rows) for rows in self._rows.values()]
        return sum(means) / len(means)

    def _mean(self, rows: Sequence[Encoded]) -> float:
        total = 0.0
        for start in range(0, len(rows), TOGETHER):
            batch = training_batch(rows[start : start + TOGETHER])
            assert batch.labels_N is not None
            at_K = (batch.labels_N != IGNORE).nonzero()[:, 0]
            total += float(self.base.loss(batch, at_K, batch.labels_N[at_K]))
        return total / sum(len(row.target) for row in rows)


def general_text() -> Mapping[str, tuple[str, ...]]:
    """Sentences by language."""
    document = json.loads(files("tritune.evaluate").joinpath("general.json").read_text(encoding="utf-8"))
    return {language: tuple(sentences) for language, sentences in document.items()}


def _encoded(encoder: Encoder, language: str, sentences: Sequence[str]) -> list[Encoded]:
    cut = [sentence.index(" ") for sentence in sentences]
    prompts = [Prompt(said[:at], said[at:]) for said, at in zip(sentences, cut, strict=True)]
    places = [f"general text, {language}, sentence {i + 1}" for i in range(len(sentences))]
    return encoder.encode(prompts, places, places)
