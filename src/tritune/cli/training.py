"""One training run in its folder: begin or go on, stop without loss, store the result and what it reached."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tritune.cli import folders
from tritune.cli.loading import base_of, check_alone, check_form, load_task, require, settled
from tritune.cli.run_folder import DEV_CURVE, LOSS_CURVE, METRICS, OWN, RunFolder
from tritune.cli.stop import stop_wish
from tritune.errors import Interrupted, Mismatch
from tritune.misfits import fields_of, inside, misfits
from tritune.progress import Progress
from tritune.recipes import documents
from tritune.recipes.settings import FuseSettings, TrainSettings
from tritune.report.told import told
from tritune.spec import defaults, differences
from tritune.tasks.base import Split

if TYPE_CHECKING:
    from tritune.adaptation import Adaptation, Evaluation
    from tritune.measure import Cost
    from tritune.report.words import Lang
    from tritune.spec import MethodConfig
    from tritune.store.registry import Stored
    from tritune.trial import Trial


def run(
    settings: TrainSettings,
    folder: RunFolder,
    progress: Progress,
    lang: Lang,
    command: str,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Train and store the result; with `resume`, from the newest state.

    Raises:
        Mismatch: something is missing or does not fit, an earlier run is in the way, or is not the one to resume.
        BadData: with everything that is wrong with the data.
        Interrupted: stopped by the user; the state is saved.
        Diverged: a loss or gradient was not finite.
    """
    require(settings, "train", "method")
    if not resume:
        folders.check_free(folder.path, OWN, overwrite=overwrite, hint="Go on with it by --resume. ")
    task = load_task(settings, progress)

    from tritune.methods import method_of
    from tritune.trial import Trial, check_rows

    config = _config(settings)
    check_form({str(settings.method): config}, settings.quantise)
    check_rows(task, settings.training())
    state = folder.load() if resume else None
    base = base_of(settings, progress)
    rate = settings.learning_rate or method_of(config).learning_rate
    # The rate is written out: a resumed run reads it from its folder, and both must be the same document.
    training = settings.training().model_copy(update={"learning_rate": rate})
    trial = Trial(base, task, config, training, rate, settings.seed, resume=state)
    resolved = settings.model_copy(update={"config": trial.config.model_dump(mode="json")})
    carry_out(trial, resolved, folder, progress, lang, command, resume=resume, again="tritune train --resume")


def carry_out(
    trial: Trial,
    settings: TrainSettings | FuseSettings,
    folder: RunFolder,
    progress: Progress,
    lang: Lang,
    command: str,
    *,
    resume: bool,
    again: str,
) -> None:
    """Begin a run in its folder, or go on with it, to the result.

    Args:
        settings: with every default of the method filled in.
        again: the command that goes on, but for its folder.

    Raises:
        Mismatch: this is not the run that was begun.
        Interrupted, Diverged: as `run`.
    """
    if resume:
        _check_same(settings, trial)
        step = trial.resume.facts.step if trial.resume else 0
        folder.forget_after(step)
        progress.say(f"going on after step {step}" if step else "no state was saved yet: from the start")
    with nullcontext() if resume else folders.replacing(folder.path, OWN, progress):
        if not resume:
            folder.begin(_document(settings, trial), command)
        _train(trial, folder, progress, lang, f"{again} --out {shlex.quote(str(folder.path))}")


def _config(settings: TrainSettings) -> MethodConfig:
    from tritune.methods import method

    check_alone({str(settings.method): settings.config})
    kind = method(str(settings.method)).Config
    hint = f"Settings of {settings.method}, with defaults: {fields_of(kind)}."
    Mismatch.check(
        "These settings of the method cannot be used.",
        misfits(kind, settings.config, inside(str(settings.method))),
        hint,
    )
    config: MethodConfig = kind.read(dict(settings.config), "config")
    return config


def _document(settings: TrainSettings | FuseSettings, trial: Trial) -> dict[str, object]:
    """The settings with every default filled in, and what they came to."""
    resolved = {"dtype": trial.base.dtype_name, "learning_rate": trial.learning_rate, "run": _came_to(trial)}
    return settled(settings.model_copy(update=resolved))


def _came_to(trial: Trial) -> dict[str, object]:
    return trial.document().model_dump(mode="json") | ({"made": dict(trial.made)} if trial.made else {})


def _check_same(settings: TrainSettings | FuseSettings, trial: Trial) -> None:
    """
    Raises:
        Mismatch: with everything in which this run differs from the one that was begun.
    """
    now = documents.parse(documents.text(_came_to(trial)), "run")
    problems = list(differences(settings.run or {}, now, since={"config": defaults(type(trial.config))}))
    Mismatch.check("This is not the run that was begun.", problems, "Resume with its own settings, base and data.")


def _train(trial: Trial, folder: RunFolder, progress: Progress, lang: Lang, again: str) -> None:
    from tritune.measure import measured
    from tritune.trial import follow

    with stop_wish() as stop, measured() as cost:
        events = folder.recorded(trial.events(save=folder.save, stop=stop))
        last = follow(events, progress, told("train", progress.lang, method=trial.method.kind), trial.total_steps)[-1]
    if last.kind != "done":
        raise Interrupted(f"Stopped after step {last.step} of {last.total}; the state is saved. Go on with:\n  {again}")
    trained = sum(p.numel() for p in trial.delta.trainable().values())
    adaptation = trial.adaptation()
    stored = adaptation.save(folder.adaptation)
    measurements = {
        split: adaptation.evaluate(split=split, progress=progress)
        for split in (Split.DEV, Split.TEST)
        if trial.task.examples(split)
    }
    _write(folder, trial, _metrics(trial, adaptation, stored, measurements, trained, cost), lang)
    folder.drop_state()


def _metrics(
    trial: Trial,
    adaptation: Adaptation,
    stored: Stored,
    measurements: Mapping[Split, Evaluation],
    trained: int,
    cost: Cost,
) -> dict[str, object]:
    last = trial.curve[-1]
    return {
        "method": adaptation.method.kind,
        "strategy": adaptation.method.strategy.value,
        "seed": trial.seed,
        "learning_rate": trial.learning_rate,
        "steps": last.step,
        "best_step": trial.best.step if trial.best else last.step,
        "metric": trial.task.metric,
        **{split.value: _scores(measurements.get(split)) for split in (Split.DEV, Split.TEST)},
        "trainable_parameters": trained,
        "stored_bytes": stored.bytes,
        "train_rows": len(trial.task.examples(Split.TRAIN)),
        "train_seconds": last.seconds,
        "train_tokens_per_second": last.tokens / last.seconds if last.seconds else None,
        "train_peak_bytes": cost.peak_bytes,
        "base_bytes": trial.base.bytes,
        "adaptation": str(stored.folder),
        "id": stored.id,
    }


def _scores(found: Evaluation | None) -> dict[str, object] | None:
    return None if found is None else {"score": found.score, "low": found.low, "high": found.high, "n": found.n}


def _write(folder: RunFolder, trial: Trial, metrics: Mapping[str, object], lang: Lang) -> None:
    from tritune.evaluate.record import Comparison, Entry
    from tritune.report import plots
    from tritune.store.files import write_json, write_text

    # The plots draw comparisons; one method alone is the smallest of them.
    names = ("method", "strategy", "seed", "metric", "train_seconds", "train_tokens_per_second", "stored_bytes")
    own = {name: metrics[name] for name in (*names, "trainable_parameters", "train_peak_bytes", "adaptation")}
    nothing = {"score": 0.0, "low": 0.0, "high": 0.0, "n": 0, "eval_peak_bytes": 0, "seconds_per_1000_rows": 0.0}
    entry = Entry.model_validate(own | nothing | {"curve": tuple(trial.curve)})
    alone = Comparison(entries=(entry,), pairs=(), caveats=())
    for name, drawn in ((DEV_CURVE, plots.dev_curves(alone, lang)), (LOSS_CURVE, plots.loss_curves(alone, lang))):
        if drawn:
            write_text(folder.path / name, plots.standalone(drawn))
    write_json(folder.path / METRICS, metrics)
