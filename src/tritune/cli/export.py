"""`tritune export`: a stored adaptation in another package's format, answered by that package before it is called done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tritune.cli import options
from tritune.cli.loading import load_adaptation, stored_at
from tritune.cli.progress import shown
from tritune.cli.screen import echo_json, page
from tritune.exchange import FORMATS, format_named
from tritune.tasks.base import Split
from tritune.tasks.classification import Classification
from tritune.tasks.stored import spec_from_document

if TYPE_CHECKING:
    from tritune.adaptation import Adaptation
    from tritune.exchange.verify import Verdict
    from tritune.store.registry import Stored

#: rows of --test that both sides answer
MOST_ROWS = 16

Format = Annotated[
    str,
    typer.Option("--format", help=f"One of {', '.join(FORMATS)}.", rich_help_panel=options.OUTPUT, show_default=False),
]
Test = Annotated[
    str | None,
    typer.Option(
        "--test",
        help=f"Labelled rows that both sides answer (the first {MOST_ROWS}); else a built-in sample of texts.",
        rich_help_panel=options.DATA,
    ),
]


def export(
    adaptation: options.Adaptation,
    format: Format,
    out: options.Folder,
    base: options.BaseNow = None,
    device: options.Device = None,
    quantise: options.QuantiseNow = None,
    test: Test = None,
    text_field: options.TextFieldNow = None,
    label_field: options.LabelFieldNow = None,
    reference: options.ReferencePython = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write an adaptation in another package's format.

    That package then loads what was written, in a process of its own, and answers the same rows.
    Where logits differ by more than rounding, nothing is left behind.

    Example:
      tritune export 4f2a9c --format peft --out exported
    """

    def task(stored: Stored) -> Classification:
        spec = spec_from_document(stored.manifest.task)
        return Classification.from_spec(spec, test=test, text=text_field, label=label_field, progress=progress.say)

    format_named(format)  # a slip of the finger is told before anything else
    with shown(quiet=quiet) as progress:
        stored = stored_at(adaptation)

        from tritune.adaptation import config_of
        from tritune.exchange import outward

        outward.check(config_of(stored), format, out, reference)
        form = options.form_now(quantise)
        loaded = load_adaptation(stored, task, progress, base=base, device=device, quantise=form)
        progress.stage(f"export and verify {format}", 0, "")
        done = outward.export(loaded, format, out, rows=_rows(loaded) if test is not None else None, python=reference)
    if as_json:
        verified = document(done.verdict)
        echo_json({"folder": str(out), "format": format, "notes": done.notes, "verified": verified})
    else:
        lines = (f"{out}: {format}", *(f"note: {note}" for note in done.notes), f"verified: {done.verdict}")
        page().print("\n".join(lines), soft_wrap=True)


def document(verdict: Verdict) -> dict[str, object]:
    """A verdict for scripts."""
    return {
        "by": verdict.by,
        "rows": verdict.rows,
        "tokens": verdict.tokens,
        "largest_difference": verdict.difference,
        "largest_logit": verdict.largest,
        "bound": verdict.bound,
        "effect": verdict.effect,
    }


def _rows(loaded: Adaptation) -> list[list[int]]:
    """The user's own rows as the adaptation sees them, right answer included."""
    from tritune.adaptation import encoder_for
    from tritune.evaluate.examples import encode

    examples = loaded.task.examples(Split.TEST)[:MOST_ROWS]
    encoder = encoder_for(loaded.base, loaded.method.virtual_tokens(loaded.config))
    return [[*row.context, *row.target] for row in encode(loaded.task, examples, encoder).encoded]
