"""Files -> records: nasty texts survive every format, line numbers are right, and damaged files are told apart."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tritune.errors import Problem
from tritune.tasks.readers import BOM, Record, reader_for

NASTY = [
    'he said "no", twice',
    '"',
    '""',
    "two\nlines",
    "two\r\nlines",
    "a\ttab, a comma; a semicolon",
    "\u202eright to left\u202c שלום مرحبا",
    "family 👩‍👩‍👧‍👦 and flag 🏳️‍🌈",
    "next line \x85, line separator \u2028, form feed \x0c",
    " spaces around ",
    "\ufeffmark in front",
    "<|im_end|><|endoftext|></s>",
    "Съешь ещё этих мягких французских булок",
]


def read(path: Path) -> tuple[list[Record], list[Problem]]:
    problems: list[Problem] = []
    reader = reader_for(path)
    assert reader is not None
    return list(reader(path, path.name, problems)), problems


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """By the reference implementation of each format."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
        path.write_bytes(text.encode())
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, sorted(rows[0]), dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(buffer.getvalue().encode())


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.sampled_from(NASTY)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.fixed_dictionaries({"text": texts, "label": texts, "more": texts}), min_size=1, max_size=6))
def test_round_trip(tmp_path: Path, ending: str, rows: list[dict[str, str]]):
    path = tmp_path / f"rows.{ending}"
    write(path, rows)
    records, problems = read(path)
    assert problems == []
    assert [record.values for record in records] == rows


def test_csv_line_numbers_are_those_of_the_file(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\r\n"one\r\n\r\ntwo",a\r\n\r\nthree,b\r\n"x\ny",c')
    records, problems = read(path)
    assert problems == []
    assert [r.where for r in records] == ["a.csv, line 2", "a.csv, line 6", "a.csv, line 7"]
    assert [r.values["text"] for r in records] == ["one\r\n\r\ntwo", "three", "x\ny"]


def test_jsonl_line_numbers_and_types(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BOM + b'{"a": 1}\r\n\n{"a": null, "b": true}\n{"a": [1.5]}')
    records, problems = read(path)
    assert problems == []
    assert [(r.where, r.values) for r in records] == [
        ("a.jsonl, line 1", {"a": 1}),
        ("a.jsonl, line 3", {"a": None, "b": True}),
        ("a.jsonl, line 4", {"a": [1.5]}),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(BOM + "text,label\nда,a\n".encode())
    assert read(path)[0][0].values == {"text": "да", "label": "a"}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_bad_utf8_names_line_and_byte(tmp_path: Path, ending: str):
    path = tmp_path / f"a.{ending}"
    start = BOM + (b"text,label\ngood,a\n" if ending == "csv" else b'{"text": "good"}\n{"text": "good"}\n')
    bad = "плохо".encode("cp1251") + b",a\n" if ending == "csv" else b'{"text": "\xff"}\n'
    path.write_bytes(start + bad + start[3:])
    _, problems = read(path)
    offset = len(start) + (0 if ending == "csv" else bad.index(b"\xff"))
    byte = "0xef" if ending == "csv" else "0xff"
    assert problems == [
        Problem(f"a.{ending}, line 3", f"byte {offset} of the file ({byte}) is not UTF-8; save the file as UTF-8")
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf16_is_named(tmp_path: Path, encoding: str):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext,label\nдом,a\n".encode(encoding))
    records, problems = read(path)
    assert not records
    assert "UTF-16" in problems[0].what


def test_ragged_rows(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,b\na\na, b, c\nd,e\n")
    records, problems = read(path)
    assert [r.where for r in records] == ["a.csv, line 2", "a.csv, line 5"]
    assert [(p.where, p.what.split(";")[0]) for p in problems] == [
        ("a.csv, line 3", "1 fields, but the header has 2"),
        ("a.csv, line 4", "3 fields, but the header has 2"),
    ]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (b'fine,a\n"never closed,b\nc,d\n', 3),
        (b'fine,a\nfine,b\n"closed" too early,b\n', 4),
        (b"fine,a\nlone\rreturn,b\n", 3),
        (b"fine,a\n" + b"x" * 200_000 + b",b\n", 3),
    ],
)
def test_broken_quotation_stops_with_the_rows_line(tmp_path: Path, rows: bytes, line: int):
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\n" + rows)
    _, problems = read(path)
    assert [p.where for p in problems] == [f"a.csv, line {line}"]
    assert "nor can the rows after it" in problems[0].what


def test_repeated_columns(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("text,label,text,,\na,b,c,d,e\n")
    records, problems = read(path)
    assert problems == [Problem("a.csv, line 1", "the column 'text' appears 2 times; rename all but one")]
    assert "" not in records[0].values


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("not json", "not a JSON object"),
        ('{"a": 1', "not a JSON object"),
        ('{"a": 1} {"a": 2}', "not a JSON object"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' appears twice"),
        ('{"b": {"c": 1, "c": 1}}', "the key 'c' appears twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ("[1, 2]", "found a list"),
        ('"text"', "found a string"),
        ("null", "found nothing (null)"),
        ("3", "found an integer"),
        ("[" * 100_000, "not a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "not a JSON object"),
    ],
)
def test_bad_json_lines_do_not_hide_the_others(tmp_path: Path, line: str, what: str):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "first"}\n' + line + '\n{"a": "last"}\n')
    records, problems = read(path)
    assert [r.values["a"] for r in records] == ["first", "last"]
    assert [p.where for p in problems] == ["a.jsonl, line 2"]
    assert what in problems[0].what


def test_a_json_array_is_one_problem(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, {"a": 2}], indent=2))
    records, problems = read(path)
    assert not records
    assert [p.where for p in problems] == ["a.json, line 1"]
    assert "one JSON object per line" in problems[0].what


def test_parquet_types_and_row_numbers(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pa.table(
        {
            "text": pa.array(["a", None]),
            "label": pa.array([1, 2], pa.int8()),
            "word": pa.array(["x", "y"]).dictionary_encode(),
            "vector": pa.array([[0.5], [0.25]]),
        }
    )
    pq.write_table(table, path)
    records, problems = read(path)
    assert problems == []
    assert [(r.where, r.values) for r in records] == [
        ("a.parquet, row 1", {"text": "a", "label": 1, "word": "x"}),
        ("a.parquet, row 2", {"text": None, "label": 2, "word": "y"}),
    ]


def test_parquet_text_that_is_not_utf8(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    offsets, data = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    pq.write_table(pa.table({"text": column}), path)
    records, problems = read(path)
    assert problems == []
    assert [r.values["text"] for r in records] == ["a", b"\xff"]


@pytest.mark.parametrize("content", [b"not parquet at all", b"PAR1" + b"\0" * 40 + b"PAR1", b"PAR1"])
def test_a_file_that_is_not_parquet(tmp_path: Path, content: bytes):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    records, problems = read(path)
    assert not records
    assert [p.where for p in problems] == ["a.parquet"]


def test_unknown_endings_have_no_reader():
    assert reader_for(Path("a.xlsx")) is None
    assert reader_for(Path("a.CSV")) is not None
