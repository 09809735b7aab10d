"""Files -> records: CSV, TSV, JSON lines, Parquet. Knows lines and columns, not what they mean for a task.

Every reader streams: one record at a time, the file read once. What cannot be read becomes a `Problem` with file and
line, and reading goes on where it can, so that one run shows everything that is wrong with a file.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tritune.errors import Problem

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read. `where` names file and line (of the row's first character), or row number."""

    where: str
    values: dict[str, object]


Reader = Callable[[Path, str, list[Problem]], Iterator[Record]]
"""(path, the name to call it in messages, where problems go) -> records."""


def reader_for(path: Path) -> Reader | None:
    """The reader of this file's ending, or None for an ending that is not known."""
    return READERS.get(path.suffix.lower())


def read_csv(path: Path, name: str, problems: list[Problem], *, delimiter: str = ",") -> Iterator[Record]:
    """Rows under a header line; quotes as in RFC 4180, strictly. Lines with nothing on them are not rows."""
    with path.open("rb") as file:
        rows = csv.reader(_lines(file, name, problems), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                problems.append(Problem(f"{name}, line {line}", _quoting(error)))
                return  # after a broken quotation nobody can say where the next row starts
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = row
                problems += _repeated(header, f"{name}, line {line}")
            elif len(row) != len(header):
                problems.append(Problem(f"{name}, line {line}", _ragged(len(row), len(header), delimiter)))
            else:
                yield Record(
                    f"{name}, line {line}", {column: v for column, v in zip(header, row, strict=True) if column}
                )


def read_tsv(path: Path, name: str, problems: list[Problem]) -> Iterator[Record]:
    """As CSV, with tabs between the fields."""
    return read_csv(path, name, problems, delimiter="\t")


def read_jsonl(path: Path, name: str, problems: list[Problem]) -> Iterator[Record]:
    """One JSON object per line. Lines with nothing on them are not rows."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file, name, problems), 1):
            if not line.strip():
                continue
            where = f"{name}, line {number}"
            if number == 1 and line.lstrip().startswith("["):
                problems.append(Problem(where, "this is a JSON array; expected one JSON object per line (JSON lines)"))
                return
            try:
                value = json.loads(line, object_pairs_hook=_object, parse_constant=_constant)
            except (ValueError, RecursionError) as error:
                problems.append(Problem(where, f"this is not a JSON object: {error}"))
                continue
            if isinstance(value, dict):
                yield Record(where, value)
            else:
                problems.append(Problem(where, f"expected one JSON object per line, found {type_name(value)}"))


def read_parquet(path: Path, name: str, problems: list[Problem]) -> Iterator[Record]:
    """Rows numbered from 1. Columns of plain values only: nothing reads vectors or nested columns here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            repeated = _repeated(schema.names, name)
            if repeated:
                problems += repeated
                return
            columns = [field.name for field in schema if not pa.types.is_nested(field.type)]
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=columns):
                cells = [_cells(batch.column(column)) for column in columns]
                for row in zip(*cells, strict=True):
                    number += 1
                    yield Record(f"{name}, row {number}", dict(zip(columns, row, strict=True)))
    except (pa.ArrowException, OSError) as error:
        problems.append(Problem(name, f"this is not a Parquet file that can be read: {str(error).splitlines()[0]}"))


READERS: dict[str, Reader] = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".parquet": read_parquet,
}


def type_name(value: object) -> str:
    """A value's type, in words that do not need Python."""
    names = {bool: "true/false", int: "an integer", float: "a decimal number", str: "a string", list: "a list"}
    names[bytes] = "bytes that are not UTF-8 text"
    if value is None:
        return "nothing (null)"
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _lines(file: BinaryIO, name: str, problems: list[Problem]) -> Iterator[str]:
    """Decoded lines, cut at line feeds only. A line with bad bytes is reported and comes with U+FFFD in their place."""
    start = 0
    for number, raw in enumerate(file, 1):
        if number == 1 and raw.startswith(_UTF16):
            problems.append(Problem(f"{name}, line 1", "this is UTF-16; expected UTF-8: save the file as UTF-8"))
            return
        line = raw.removeprefix(BOM) if number == 1 else raw
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + len(raw) - len(line) + error.start
            problems.append(
                Problem(
                    f"{name}, line {number}",
                    f"byte {at} of the file (0x{line[error.start]:02x}) is not UTF-8; save the file as UTF-8",
                )
            )
            text = line.decode("utf-8", "replace")
        start += len(raw)
        yield text


def _quoting(error: csv.Error) -> str:
    return (
        f"this row cannot be read ({error}), nor can the rows after it; a field that holds quotation marks, separators "
        'or line breaks has to stand in quotation marks, and a mark inside it is doubled ("")'
    )


def _ragged(found: int, expected: int, delimiter: str) -> str:
    mark = "tab" if delimiter == "\t" else f"'{delimiter}'"
    return f"{found} fields, but the header has {expected}; a field that holds a {mark} has to stand in quotation marks"


def _repeated(columns: list[str], where: str) -> list[Problem]:
    repeated = dict.fromkeys(c for c in columns if c and columns.count(c) > 1)
    return [Problem(where, f"the column '{c}' appears {columns.count(c)} times; rename all but one") for c in repeated]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: Python would keep the last and say nothing."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice")
    return value


def _constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _cells(column: Any) -> list[object]:
    """Python values of an Arrow column; a text that is not UTF-8 becomes bytes, which no field accepts."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_cell(value) for value in column]


def _cell(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return bytes(value.as_buffer().to_pybytes())
