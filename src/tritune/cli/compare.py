"""`tritune compare`: every method on the same data, side by side, with plain prompting as the baseline."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tritune.cli import comparison_folder, folders, given, options
from tritune.cli.comparison_folder import OWN, RECORD, REPORT, TABLE, may_go_on
from tritune.cli.language import language
from tritune.cli.loading import RUN, base_of, check_alone, check_form, load_task, require, settled
from tritune.cli.progress import shown
from tritune.cli.screen import echo_json, page
from tritune.errors import Interrupted, Mismatch, Problem
from tritune.finished import ENTRIES
from tritune.misfits import Spelled, fields_of, misfits
from tritune.progress import Progress
from tritune.recipes import documents
from tritune.recipes.settings import CompareSettings
from tritune.report.told import told

if TYPE_CHECKING:
    from tritune.comparison import Plan
    from tritune.evaluate.record import Comparison
    from tritune.models.pretrained import Base
    from tritune.report.words import Lang

SEARCH = "Search"

Methods = Annotated[
    str | None, typer.Option("--methods", help="Any of {methods}; or all.", metavar="A,B,...", rich_help_panel=SEARCH)
]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds", help="Runs per method; the first is also the search's.", metavar="N,...", rich_help_panel=SEARCH
    ),
]
Shots = Annotated[
    int | None,
    typer.Option("--shots", help="Solved examples for few-shot prompting; 0: without.", rich_help_panel=SEARCH),
]
Rates = Annotated[
    str | None,
    typer.Option(
        "--rates",
        help="Learning rates to try, as factors of each method's own.",
        metavar="X,...",
        rich_help_panel=SEARCH,
    ),
]
SearchShare = Annotated[
    float | None,
    typer.Option(
        "--search-share", help="Share of all steps every rate gets before one is chosen.", rich_help_panel=SEARCH
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A method's own setting; repeat as needed.", metavar="METHOD.KEY=VALUE", rich_help_panel=SEARCH
    ),
]


def compare(
    ctx: typer.Context,
    out: options.Folder,
    recipe: options.Recipe = None,
    base: options.Base = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quantise: options.QuantiseBase = None,
    compiled: options.Compiled = None,
    cuda_graphs: options.CudaGraphs = None,
    train: options.Train = None,
    test: options.Test = None,
    dev: options.Dev = None,
    text_field: options.TextField = None,
    label_field: options.LabelField = None,
    labels: options.Labels = None,
    label_words: options.LabelWords = None,
    template: options.Template = None,
    train_rows: options.TrainRows = None,
    dev_rows: options.DevRows = None,
    test_rows: options.TestRows = None,
    data_seed: options.DataSeed = None,
    allow_duplicates: options.AllowDuplicates = None,
    methods: Methods = None,
    changes: Changes = None,
    seeds: Seeds = None,
    shots: Shots = None,
    rates: Rates = None,
    search_share: SearchShare = None,
    epochs: options.Epochs = None,
    learning_rate: options.LearningRate = None,
    batch_tokens: options.BatchTokens = None,
    accumulate: options.Accumulate = None,
    evaluations: options.Evaluations = None,
    patience: options.Patience = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    lang: options.Lang = None,
) -> None:
    """Train every method on your data and measure all of them on the same test rows.

    Plain prompting is the baseline. Writes a table, a report and every adaptation below --out.
    Stopped, it goes on with what is missing when started again with the same --out;
    finished, it shows the result.

    Example:
      tritune compare --train train.csv --test test.csv --text-field review \\
        --label-field sentiment --train-rows 500 --out runs/mine
    """
    # The options reach the settings by their names: whatever was given lies over the recipe.
    configs = _configs(changes or ())
    settings = given.settings(CompareSettings, ctx.params, recipe, {"configs": configs} if configs else {})
    if idle := [method for method in configs if method not in settings.kinds()]:
        raise typer.BadParameter(f"'{idle[0]}' is not among the methods compared", param_hint="--set")
    with shown(quiet=quiet, lang=language(lang)) as progress:
        comparison = run(settings, out, language(lang), progress, command_of(ctx), overwrite=overwrite)
    tell(comparison, out, language(lang), as_json=as_json)


def command_of(ctx: typer.Context) -> str:
    """What was typed."""
    return shlex.join(["tritune", *(ctx.obj or ())])


def run(
    settings: CompareSettings,
    out: Path,
    lang: Lang,
    progress: Progress,
    command: str,
    *,
    overwrite: bool,
    base: Base | None = None,
) -> Comparison:
    """Compare, and write everything that is known afterwards; where it was stopped before, go on. Nothing, where it is done.

    Args:
        base: where it is loaded already.

    Raises:
        Mismatch: something is missing, does not fit, or another run is in the way.
        BadData: with everything that is wrong with the data.
        Interrupted: stopped by the user; what was measured is kept.
    """
    require(settings, "train", "test")
    if not overwrite and comparison_folder.is_finished(out):
        return finished(settings, out, progress)
    going_on = may_go_on(out, overwrite=overwrite)
    task = load_task(settings, progress)

    from tritune.comparison import check
    from tritune.comparison import compare as measure
    from tritune.report.compare import markdown
    from tritune.report.html import html
    from tritune.store.files import write_json, write_text

    plan = plan_of(settings)
    check(task, plan)
    check_form(plan.configs, settings.quantise)
    base = base or base_of(settings, progress)
    with nullcontext() if going_on else folders.replacing(out, OWN, progress):
        if not going_on:
            resolved = settings.model_copy(update=_resolved(plan) | {"dtype": base.dtype_name})
            write_text(out / RUN, documents.text(settled(resolved), comment=command))
        try:
            comparison, results = measure(base, task, plan, out, command=command, progress=progress)
        except KeyboardInterrupt:
            raise Interrupted(_how_to_go_on(out)) from None
        write_text(out / TABLE, markdown(comparison, lang))
        write_text(out / REPORT, html(comparison, results, lang))
        write_json(out / RECORD, comparison.model_dump(mode="json"))
    return comparison


def finished(settings: CompareSettings, out: Path, progress: Progress) -> Comparison:
    """The comparison that was finished here with the same settings and data. The base is not looked at.

    Raises:
        Mismatch: it is another one; names every difference.
    """
    task = load_task(settings, progress)

    from tritune.trial import data_digests

    resolved = settings.model_copy(update=_resolved(plan_of(settings)))
    comparison_folder.check_same(out, settled(resolved), data_digests(task))
    progress.say(told("finished", progress.lang, out=out, report=out / REPORT))
    return comparison_folder.read(out)


def _how_to_go_on(out: Path) -> str:
    measured = len(list((out / ENTRIES).glob("*.json")))
    if not measured:
        return "Stopped before anything was measured."
    again = shlex.join(["tritune", "compare", "--config", str(out / RUN), "--out", str(out)])
    return f"Stopped; {measured} measurements are kept. Go on with:\n  {again}"


def tell(comparison: Comparison, out: Path, lang: Lang, *, as_json: bool) -> None:
    """The result on standard output."""
    from tritune.report import compare as report
    from tritune.report.words import words

    if as_json:
        echo_json(comparison.model_dump(mode="json"))
        return
    console, texts = page(), words(lang)
    console.print(report.table(comparison, lang))
    console.print(f"\n{report.recommendation(comparison, lang)}\n")
    console.print(f"{texts['caveats']}:")
    for caveat in report.caveats(comparison, lang):
        console.print(f"- {caveat}")
    console.print(f"\n{out / REPORT}", soft_wrap=True)


def _configs(changes: Sequence[str]) -> dict[str, dict[str, object]]:
    """["method.key=value"] -> settings by method."""
    configs: dict[str, dict[str, object]] = {}
    for name, value in given.assignments(changes).items():
        method, dot, key = name.partition(".")
        if not dot:
            raise typer.BadParameter(f"'{name}' is not METHOD.KEY", param_hint="--set")
        configs.setdefault(method, {})[key] = value
    return configs


def plan_of(settings: CompareSettings) -> Plan:
    """The plan, with every method's own settings checked."""
    from tritune.comparison import Plan
    from tritune.methods import method

    check_alone({kind: settings.configs.get(kind, {}) for kind in settings.kinds()})
    problems: list[Problem] = []
    hints: list[str] = []
    for kind, config in settings.configs.items():
        found = misfits(method(kind).Config, config, _of_method(kind))
        problems += found
        hints += [f"Settings of {kind}: {fields_of(method(kind).Config)}."] if found else []
    Mismatch.check("These settings of methods cannot be used.", problems, "\n".join(hints))
    optional = {name: getattr(settings, name) for name in ("shots", "rates", "search_share")}
    return Plan(
        methods=settings.kinds(),
        configs={
            kind: method(kind).Config.read(dict(settings.configs.get(kind, {})), kind) for kind in settings.kinds()
        },
        seeds=settings.seeds,
        training=settings.training(),
        **{name: value for name, value in optional.items() if value is not None},
    )


def _of_method(kind: str) -> Spelled:
    """Settings of methods are called alike in --set and in a recipe."""
    return lambda path: f"'{kind}.{path}'" if path else kind


def _resolved(plan: Plan) -> dict[str, object]:
    return {
        "methods": plan.methods,
        "configs": {kind: config.model_dump(mode="json") for kind, config in plan.configs.items()},
        "shots": plan.shots,
        "rates": plan.rates,
        "search_share": plan.search_share,
    }
