"""Classification: one text, one of several labels. Each label is answered in words and scored by its likelihood.

`classification(...)` reads the data and checks all of it before anything is trained. Knows no tokenizer and no model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tritune.errors import Mismatch, Problem
from tritune.spec import digest
from tritune.tasks.base import Answer, Example, Prompt, Split, Task, TaskSpec
from tritune.tasks.duplicates import repeated
from tritune.tasks.reading import Reading, repeats
from tritune.tasks.rows import Columns, canonical_label
from tritune.tasks.sources import Progress, Source, has_own_splits
from tritune.tasks.splits import balanced
from tritune.text.template import Chat, Template, TemplateSpec, chat_pieces, default_template

#: the question stands in front, where all rows share it and it costs nothing per row
MOVIE_REVIEWS_TEMPLATE = TemplateSpec(instruction="Is the movie review positive or negative?", context="{{ text }} =>")


class ClassificationSpec(TaskSpec):
    """What an adaptation remembers of its classification task.

    Attributes:
        text_field, label_field: column names of the data.
        labels: all labels, in the order of `Prompt.choices`.
        label_words: for each label the words it is answered with.
        template: the prompt; its digest is part of what an adaptation is bound to.
    """

    kind: Literal["classification"] = "classification"
    text_field: str
    label_field: str
    labels: tuple[str, ...]
    label_words: dict[str, str]
    template: TemplateSpec


class Classification(Task):
    """A classification task with its data. Made by `classification(...)`, or by `from_spec` from a stored one."""

    metric = "accuracy"

    def __init__(
        self,
        spec: ClassificationSpec,
        splits: Mapping[Split, Sequence[Example]] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._spec = spec
        self._splits = {split: tuple((splits or {}).get(split, ())) for split in Split}
        self._facts = dict(facts or {})
        self._template = Template(spec.template)
        self._chat: Chat | None = None
        self._label_of = {word: label for label, word in spec.label_words.items()}

    @classmethod
    def from_spec(
        cls,
        spec: ClassificationSpec,
        *,
        test: Source | None = None,
        text: str | None = None,
        label: str | None = None,
        test_rows: int | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Classification:
        """The task of a stored adaptation, with other rows to test on: labels, words and prompt are the stored ones.

        Args:
            test: where the labelled rows are. None: no rows, only prompts.
            text, label: what the text and label columns are called there, if not as in the spec.
            test_rows, seed: as for `classification`, so that the same rows are drawn again.

        Raises:
            BadData: with everything that is wrong with the rows, labels that the spec does not know included.
            Unavailable: the source could not be fetched.
        """
        columns = _columns(spec, Template(spec.template), text or spec.text_field, label or spec.label_field)
        reading = Reading(columns, progress)
        if test is not None:
            reading.read(Split.TEST, test)
        reading.check_labels(spec.labels)
        reading.raise_problems()
        splits = reading.splits({Split.TEST: test_rows}, seed)
        return cls(spec, splits, reading.facts)

    @property
    def spec(self) -> ClassificationSpec:
        return self._spec

    @property
    def answers(self) -> tuple[str, ...]:
        return self._spec.labels

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of `Prompt.choices`."""
        return self._spec.labels

    def bind_chat(self, chat: Chat) -> None:
        """Give a "chat" template the base's own way of writing turns. Other templates do without."""
        self._chat = chat

    def examples(self, split: Split) -> Sequence[Example]:
        return self._splits[split]

    def prompt(self, example: Example, shots: Sequence[Example] = ()) -> Prompt:
        """Text for one example, solved examples first. An example without a label gets no target.

        Raises:
            Mismatch: the template is a chat template and no base is bound, or it does not suit this row.
            ValueError: a label the task does not know, or a shot without one.
        """
        solved = [(shot.fields, self._word(shot)) for shot in shots]
        if self._spec.template.kind == "chat":
            if self._chat is None:
                raise Mismatch("A chat template needs a base to render it: call bind_chat first.")
            turns = self._template.messages(example.fields, solved)
            pieces = tuple((piece.text, piece.control) for piece in chat_pieces(self._chat, turns))
            context = "".join(text for text, _ in pieces)
        else:
            pieces = ()
            context = self._template.text(example.fields, solved)
        # A chat template ends the line before the assistant speaks; then the answer needs no space of its own.
        lead = "" if context[-1:].isspace() else " "
        target = None if example.label is None else lead + self._word(example)
        return Prompt(context, target, tuple(lead + self._spec.label_words[label] for label in self.labels), pieces)

    def score(self, example: Example, answer: Answer) -> Mapping[str, float]:
        """`accuracy`: 1.0 if the answer is the right label, else 0.0.

        `log_loss` (nats, lower is better), where the answer has log-likelihoods: minus the logarithm of the right
        label's share, the likelihoods of all labels taken to sum to one.

        Raises:
            ValueError: the example has no label, or one the task does not know.
        """
        if example.label not in self._spec.label_words:
            raise ValueError(f"{example.where}: no score without a known label, found {example.label!r}")
        scores = {"accuracy": float(self.label_of(answer) == example.label)}
        if answer.log_likelihoods:
            gold = answer.log_likelihoods[self.labels.index(example.label)]
            scores["log_loss"] = _log_sum_exp(answer.log_likelihoods) - gold
        return scores

    def label_of(self, answer: Answer) -> str | None:
        """The label an answer stands for, or None if its text is no label's words."""
        return self._label_of.get(answer.text.strip())

    def shown(self, example: Example) -> str:
        return example.fields[self._spec.text_field]

    def shots(self, k: int, seed: int = 0) -> tuple[Example, ...]:
        """`k` training examples with the labels in equal number (give or take one), in an order drawn by the seed."""
        return balanced(self._splits[Split.TRAIN], self.labels, k, seed)

    def unlabelled(
        self, source: Source | Sequence[str], *, text: str | None = None, progress: Progress | None = None
    ) -> tuple[Example, ...]:
        """Rows to be answered: texts, mappings, or any source of rows. A label column is not looked at.

        Args:
            source: the rows.
            text: what the text column is called there, if not as in the spec.
            progress: told what is being fetched.

        Raises:
            BadData: with everything that is wrong with the rows.
            Unavailable: the source could not be fetched.
        """
        if not isinstance(source, str) and isinstance(source, Sequence):
            source = [{text or self._spec.text_field: row} if isinstance(row, str) else row for row in source]
        reading = Reading(_columns(self._spec, self._template, text or self._spec.text_field, None), progress)
        reading.read(Split.TEST, source)
        reading.raise_problems()
        return tuple(reading.tables[Split.TEST].examples)

    def describe(self) -> Mapping[str, Any]:
        counts = {split: Counter(e.label for e in rows) for split, rows in self._splits.items()}
        repeats = {split: repeated(rows) for split, rows in self._splits.items()}
        return {
            "kind": self._spec.kind,
            "text_field": self._spec.text_field,
            "label_field": self._spec.label_field,
            "rows": {split.value: len(rows) for split, rows in self._splits.items()},
            "labels": {
                label: {
                    "words": self._spec.label_words[label],
                    **{split.value: counts[split][label] for split in Split},
                }
                for label in self.labels
            },
            "repeated_rows": {split.value: rows for split, (rows, _) in repeats.items()},
            "contradicting_rows": {split.value: rows for split, (_, rows) in repeats.items()},
            "template": self._spec.template.context,
            "template_digest": digest(self._spec.template),
            **self._facts,
        }

    def _word(self, example: Example) -> str:
        if example.label not in self._spec.label_words:
            raise ValueError(f"{example.where}: the task has no label {example.label!r}")
        return self._spec.label_words[example.label]


def classification(
    train: Source | None = None,
    test: Source | None = None,
    dev: Source | None = None,
    *,
    text: str = "text",
    label: str = "label",
    labels: Sequence[str | int | bool] | None = None,
    label_words: Mapping[str | int | bool, str] | None = None,
    template: TemplateSpec | str | None = None,
    dev_fraction: float = 0.1,
    train_rows: int | None = None,
    dev_rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
    allow_duplicates: bool = False,
    progress: Progress | None = None,
) -> Classification:
    """A classification task from labelled rows.

    Sources are paths (.csv, .tsv, .jsonl, .parquet), "hub:owner/name", "movie-reviews" (which has splits of its own: as
    `train` alone it brings dev and test along), or rows as mappings.

    Args:
        train, test, dev: where the rows are. Without `dev`, about `dev_fraction` of the training texts become dev, by a
            hash of the text: always the same ones, equal texts together.
        text, label: the columns of the text and of the label. Labels are texts, integers or true/false.
        labels: all labels in the order wanted; by default those of the training rows (of the test rows without any),
            numbers by size and words by alphabet. Then a label that looks like another one misspelt is a problem.
        label_words: what the model answers for a label, where that is not the label itself.
        template: Jinja source of the prompt, or a whole `TemplateSpec`. It may show any column of the rows.
        train_rows, dev_rows, test_rows: use only so many rows, drawn by `seed` with the labels in proportion. A smaller
            number of rows lies inside a larger one. More than there are: all.
        allow_duplicates: go on when a test or dev row is a training row too, and count it (see `describe`).
        progress: told what is being fetched.

    Raises:
        BadData: with everything that is wrong with the rows of all files: file, line, field.
        Mismatch: the other arguments do not fit.
        Unavailable: a source could not be fetched.
    """
    chosen = _template(template, text, label, reviews=has_own_splits(train) or has_own_splits(test))
    columns = Columns(text, label, Template(chosen).fields)
    limits = {Split.TRAIN: train_rows, Split.DEV: dev_rows, Split.TEST: test_rows}
    _check_arguments(columns, limits, dev_fraction)
    given: dict[Split, Source | None] = {Split.TRAIN: train, Split.DEV: dev, Split.TEST: test}
    if has_own_splits(train):
        given = {split: train if source is None else source for split, source in given.items()}

    reading = Reading(columns, progress)
    for split, source in given.items():
        if source is not None:
            reading.read(split, source)
    if not reading.tables:
        raise Mismatch("A classification needs rows: give train, test or both.")
    names = _labels(labels, reading)
    words = _words(names, label_words, reading)
    reading.check_labels(names)
    reading.check_duplicates(allowed=allow_duplicates)
    reading.raise_problems()
    if train is not None and given[Split.DEV] is None and dev_fraction:
        reading.split_dev(dev_fraction)
        reading.raise_problems()
    spec = ClassificationSpec(text_field=text, label_field=label, labels=names, label_words=words, template=chosen)
    splits = reading.splits(limits, seed)
    return Classification(spec, splits, reading.facts)


def described(
    labels: Sequence[str | int | bool],
    *,
    label_words: Mapping[str | int | bool, str] | None = None,
    template: TemplateSpec | str | None = None,
    text: str = "text",
    label: str = "label",
) -> Classification:
    """A classification task without rows, from its description alone: enough to predict.

    Args:
        labels, label_words, template, text, label: as for `classification`.

    Raises:
        BadData, Mismatch: they do not fit each other.
    """
    chosen = _template(template, text, label, reviews=False)
    columns = Columns(text, label, Template(chosen).fields)
    _check_arguments(columns, {}, 0.0)
    reading = Reading(columns)
    names = _labels(labels, reading)
    words = _words(names, label_words, reading)
    reading.raise_problems()
    return Classification(
        ClassificationSpec(text_field=text, label_field=label, labels=names, label_words=words, template=chosen)
    )


def _template(given: TemplateSpec | str | None, text: str, label: str, *, reviews: bool) -> TemplateSpec:
    if isinstance(given, TemplateSpec):
        return given
    if given is not None:
        return TemplateSpec(context=given)
    return MOVIE_REVIEWS_TEMPLATE if reviews and text == "text" else default_template(text, label)


def _columns(spec: ClassificationSpec, template: Template, text: str, label: str | None) -> Columns:
    """The columns of a file whose text and label columns may be called otherwise than in the spec."""
    called = {spec.text_field: text, **({spec.label_field: label} if label else {})}
    return Columns(spec.text_field, spec.label_field if label else None, template.fields, called)


def _check_arguments(columns: Columns, limits: Mapping[Split, int | None], dev_fraction: float) -> None:
    problems = []
    if columns.text == columns.label:
        problems.append(Problem("text, label", f"both are the column '{columns.text}'; expected two columns"))
    if columns.text not in columns.others:
        shown = ", ".join(f"'{field}'" for field in columns.others) or "no field"
        problems.append(Problem("template", f"it shows {shown}, but not the text column '{columns.text}'"))
    if columns.label in columns.others:
        problems.append(Problem("template", f"it shows the label column '{columns.label}', which is the answer"))
    if not 0 <= dev_fraction <= 0.5:
        problems.append(Problem("dev_fraction", f"expected 0 to 0.5, found {dev_fraction}"))
    for split, rows in limits.items():
        if rows is not None and rows < 1:
            problems.append(Problem(f"{split}_rows", f"expected at least 1, found {rows}"))
    Mismatch.check("These settings do not fit a classification.", problems)


def _labels(given: Sequence[str | int | bool] | None, reading: Reading) -> tuple[str, ...]:
    """All labels in order; what is wrong with them goes to the reading's problems."""
    if given is None:
        names = reading.found_labels()
        reading.check_spelling()
    else:
        names = tuple(canonical_label(label)[0] for label in given)
        if "" in names:
            reading.problems.append(Problem("labels", "a label is empty or not a text, an integer or true/false"))
        names = tuple(filter(None, names))
        reading.problems += [Problem("labels", f"'{label}' is given twice") for label in repeats(names)]
        names = tuple(dict.fromkeys(names))
    # Without a single readable label the reason is reported already.
    if len(names) == 1 or (given is not None and not names):
        reading.problems.append(Problem("labels", f"expected at least two different labels, found {list(names)}"))
    return names


def _words(names: Sequence[str], given: Mapping[str | int | bool, str] | None, reading: Reading) -> dict[str, str]:
    """Every label's words: distinct, not empty, without white space around them."""
    own = {canonical_label(label)[0]: words for label, words in (given or {}).items()}
    words = {name: own.get(name, name) for name in names}
    found = []
    if given is not None and len(own) < len(given):
        found.append("a label is given twice (1 and '1' are the same label)")
    if names:
        found += [f"'{label}' is not a label; the labels are {', '.join(names)}" for label in own if label not in words]
    found += [_word_problem(name, word) for name, word in words.items()]
    found += [f"'{word}' stands for more than one label" for word in repeats(words.values())]
    reading.problems += [Problem("label_words", what) for what in found if what]
    return words


def _word_problem(label: str, word: object) -> str:
    if isinstance(word, str) and word and word == word.strip():
        return ""
    return f"the words of '{label}' are {word!r}; expected a text without white space around it"


def _log_sum_exp(values: Sequence[float]) -> float:
    top = max(values)
    return top if math.isinf(top) else top + math.log(sum(math.exp(value - top) for value in values))
