"""Records -> examples: every check that a row of texts and a label has to pass. Knows no file format and no prompt.

Values are checked, never repaired: what does not fit is reported with file, line and field. Three forms are brought
together so that one label has one spelling: integers become their digits (1 -> "1"), true/false become "true" and
"false" (as JSON writes them), and white space around a label is taken off. Decimal numbers are no labels: 1.0 and 1
would be two.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tritune.errors import Problem
from tritune.tasks.base import Example
from tritune.tasks.readers import Record, type_name

MAX_FIELD_CHARACTERS = 131_072
"""Longest text of one field; the csv module's own limit, kept for every format."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which fields an example gets: the text, the label (None: rows to be answered), and others the prompt shows.

    `called` says what a file calls a field, where that is something else.
    """

    text: str
    label: str | None
    others: tuple[str, ...] = ()
    called: Mapping[str, str] = field(default_factory=dict)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of an example."""
        return tuple(dict.fromkeys((self.text, *self.others)))

    @property
    def label_column(self) -> str | None:
        """What the file calls the label."""
        return None if self.label is None else self.column(self.label)

    @property
    def needed(self) -> tuple[str, ...]:
        """Every column that the file has to have."""
        names = (*self.fields, self.label) if self.label is not None else self.fields
        return tuple(dict.fromkeys(self.column(name) for name in names))

    def column(self, name: str) -> str:
        """What the file calls a field."""
        return self.called.get(name, name)


@dataclass(slots=True)
class Table:
    """The examples of one source, and for each the values of the columns nobody asked for.

    `labels` holds those of rows with other problems as well: a label is no less known for them.
    """

    name: str
    examples: list[Example] = field(default_factory=list)
    rest: list[dict[str, str]] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)


def read_table(name: str, records: Iterable[Record], columns: Columns, problems: list[Problem]) -> Table:
    """All rows of a source as examples; what is wrong with them goes to `problems`.

    Rows with a problem are left out of the table: they never reach a task, because the caller raises.
    """
    table = Table(name)
    seen: dict[str, None] = {}
    absent: dict[str, list[str]] = {column: [] for column in columns.needed}
    ids: Counter[str] = Counter()
    before = len(problems)
    count = 0
    for record in records:
        count += 1
        seen.update(dict.fromkeys(record.values))
        missing = [column for column in columns.needed if column not in record.values]
        for column in missing:
            absent[column].append(record.where)
        if missing:
            continue
        example = _example(record, columns, problems, ids, table.labels)
        if example is not None:
            table.examples.append(example)
            table.rest.append(_rest(record, columns))
    for column, places in absent.items():
        if count and len(places) == count:
            problems.append(_unknown_column(name, column, tuple(seen)))
        else:
            problems += [Problem(f"{place}, field '{column}'", "the row has no such field") for place in places]
    if not count and len(problems) == before:
        problems.append(Problem(name, "there are no rows in it; expected at least one"))
    return table


def row_id(fields: Mapping[str, str], taken: Counter[str]) -> str:
    """A row's name, made of its fields: the same on every machine, with or without a label. Repeats are numbered."""
    document = json.dumps(sorted(fields.items()), ensure_ascii=True)
    name = hashlib.sha256(document.encode()).hexdigest()[:16]
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}-{taken[name]}"


def check_text(value: object) -> str:
    """What is wrong with a text, or nothing."""
    if not isinstance(value, str):
        return f"expected a text, found {type_name(value)}"
    if not value.strip():
        return "the text is empty; fill it in or delete the row" if not value else "the text is only white space"
    return check_characters(value)


def check_characters(value: str) -> str:
    """What is wrong with the characters of a string, or nothing."""
    if len(value) > MAX_FIELD_CHARACTERS:
        return f"{len(value)} characters; at most {MAX_FIELD_CHARACTERS} are read"
    if "\0" in value:
        return f"character {value.index(chr(0)) + 1} is NUL (U+0000), which is not text; remove it"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        return f"character {error.start + 1} is half of a surrogate pair (U+{code:04X}), which is not text; remove it"
    return ""


def canonical_label(value: object) -> tuple[str, str]:
    """(label, what is wrong with it): one of the two is empty."""
    if isinstance(value, bool):
        return ("true" if value else "false"), ""
    if isinstance(value, int):
        return str(value), ""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "", "the label is missing"
    if not isinstance(value, str):
        return "", f"expected a label (a text, an integer or true/false), found {type_name(value)}"
    return ("", what) if (what := check_characters(value)) else (value.strip(), "")


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean ...?" where something known is close, or nothing."""
    folded = {k.strip().casefold(): k for k in reversed(known)}
    close = difflib.get_close_matches(name.strip().casefold(), folded, n=1, cutoff=0.6)
    return f"; did you mean '{folded[close[0]]}'?" if close else ""


def _example(
    record: Record, columns: Columns, problems: list[Problem], ids: Counter[str], labels: set[str]
) -> Example | None:
    found: list[Problem] = []
    fields: dict[str, str] = {}
    for name in columns.fields:
        value = record.values[columns.column(name)]
        text, what = (value, check_text(value)) if name == columns.text else _other(value)
        if what:
            found.append(Problem(f"{record.where}, field '{columns.column(name)}'", what))
        else:
            fields[name] = str(text)
    label = None
    if columns.label_column is not None:
        label, what = canonical_label(record.values[columns.label_column])
        if what:
            found.append(Problem(f"{record.where}, field '{columns.label_column}'", what))
        else:
            labels.add(label)
    if found:
        problems += found
        return None
    return Example(row_id(fields, ids), record.where, fields, label)


def _other(value: object) -> tuple[str, str]:
    """A column that only the template asks for: a text (which may be empty) or an integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), ""
    if not isinstance(value, str):
        return "", f"expected a text or an integer, found {type_name(value)}"
    return value, check_characters(value)


def _rest(record: Record, columns: Columns) -> dict[str, str]:
    """The plain values of the columns nobody asked for: they tell whether two rows are the same row."""
    plain = str | int | float | bool
    return {k: str(v) for k, v in record.values.items() if k not in columns.needed and isinstance(v, plain)}


def _unknown_column(name: str, column: str, known: tuple[str, ...]) -> Problem:
    listed = ", ".join(f"'{k}'" for k in known)
    what = f"no such column; the columns are {listed}{nearest(column, known)}"
    if len(known) == 1 and (mark := next((m for m in (";", "\t") if m in known[0]), "")):
        shown = "a tab" if mark == "\t" else f"'{mark}'"
        what += f" If {shown} separates the fields: .csv is read with commas, .tsv with tabs; save the file anew"
    return Problem(f"{name}, field '{column}'", what)
