"""The main job: every method on the same data, measured side by side, with plain prompting as the baseline.

For each method the learning rate is chosen on dev from a grid of equal size and equal cost: all rates start, run a
share of the steps, and the best goes on to the end. Then further seeds with that rate (`seeds.py`). The test set is touched
once per adaptation, after everything was chosen, through the path that serves. Knows no method by name.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from tritune.adaptation import Evaluation, base_ref, chat_digest, encoder_for, evaluation
from tritune.errors import Mismatch, Problem
from tritune.evaluate import examples
from tritune.evaluate.caveats import caveat_text, caveats
from tritune.evaluate.forgetting import ForgettingProbe
from tritune.evaluate.record import Comparison, Entry, ExampleResult, SearchPoint
from tritune.evaluate.stats import compare_pairs
from tritune.finished import ADAPTATIONS, Finished
from tritune.forecast import Work
from tritune.measure import Cost, measured
from tritune.methods import METHODS, not_alone
from tritune.methods import method as method_named
from tritune.models.pretrained import Base
from tritune.progress import Progress, Silent
from tritune.report import units
from tritune.report.told import told
from tritune.report.words import Lang
from tritune.run import Training
from tritune.search import choose
from tritune.seeds import Trained, alone, further
from tritune.spec import Given, MethodConfig, Scope, Strategy, defaults
from tritune.tasks.base import Example, Split, Task
from tritune.trial import TrainingRows, Trial, data_digests, training_rows


class Plan(Given):
    """What to compare, and how hard to try. The same effort for every method.

    methods: kinds, or configs by kind in `configs`.
    seeds: runs per method; the first one is also the search's.
    shots: solved examples for few-shot prompting (at least one per label is advisable); 0: no few-shot baseline.
    rates: learning rates to try, as factors of each method's default rate.
    search_share: share of all steps that every rate gets before one is chosen.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    configs: Mapping[str, MethodConfig] = {}
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    shots: int = Field(default=4, ge=0)
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(1 / 3, 1.0, 3.0), min_length=1)
    search_share: float = Field(default=0.25, gt=0, le=1)
    training: Training = Training()


def compare(
    base: Base, task: Task, plan: Plan, out: Path, *, command: str = "", progress: Progress | None = None
) -> tuple[Comparison, Mapping[str, Mapping[int, tuple[ExampleResult, ...]]]]:
    """Measure everything in the plan; adaptations are stored below `out`.

    Where an earlier start with the same plan, data, base and machine was stopped there, what it measured is taken over.

    Returns:
        The comparison, and the judged test examples by method and seed.

    Raises:
        Mismatch: an unknown method, or one that does not fit the base, no test rows, or `out` holds measurements of another
            comparison.
        Diverged: every learning rate of a method diverged.
    """
    progress = progress or Silent()
    unsaid = [problem for kind in plan.methods if kind not in plan.configs for problem in not_alone(kind, {})]
    Mismatch.check("A method that is made of others is not trained by its name alone.", unsaid)
    configs = {kind: plan.configs.get(kind) or method_named(kind).Config() for kind in plan.methods}
    check(task, plan)
    _check_fit(base, configs)
    rows = _encoded(base, task, configs, plan)
    since = {"configs": {kind: defaults(type(config)) for kind, config in configs.items()}}
    found = Finished.begin(out, _document(base, task, plan, configs), progress, since)
    probe = ForgettingProbe(base, _most_virtual(configs))
    for name, shots in _prompting(task, plan):
        _measure_prompting(base, task, name, shots, found, progress)
        if len(found.entries) == 1 and (ahead := _ahead(found.entries[0], task, plan)):
            progress.say(told("ahead", progress.lang, time=units.seconds(ahead, progress.lang)))
    for kind, config in configs.items():
        _measure_method(base, task, kind, config, plan, rows, found, probe, progress)
    return _comparison(base, task, plan, found, command), found.results


def check(task: Task, plan: Plan) -> None:
    """What needs no base.

    Raises:
        Mismatch: rows are missing, or settings contradict each other.
    """
    problems = [Problem(split, "no rows") for split in Split if not task.examples(split)]
    problems += [Problem(f"seed {s}", "given twice") for s in set(plan.seeds) if plan.seeds.count(s) > 1]
    if not plan.training.evaluations and len(plan.rates) > 1 and plan.training.learning_rate is None:
        problems.append(Problem("evaluations", "0, but the learning rate is chosen by looking at dev"))
    Mismatch.check("This cannot be compared.", problems, "A comparison needs training rows, dev rows and test rows.")


def _check_fit(base: Base, configs: Mapping[str, MethodConfig]) -> None:
    """What only the last method cannot do on this base must not be found after hours."""
    problems: list[Problem] = []
    fitting: list[str] = []
    for kind, config in configs.items():
        try:
            method_named(kind).budget(config, base)
            fitting.append(kind)
        except Mismatch as error:
            problems += [Problem(f"{kind}, {problem.where}", problem.what) for problem in error.problems]
    Mismatch.check(f"Not every method fits {base.name}.", problems, f"Those that do: {','.join(fitting) or 'none'}.")


def _encoded(base: Base, task: Task, configs: Mapping[str, MethodConfig], plan: Plan) -> TrainingRows:
    """Training and dev rows for all trials. Rows that only the last method could not take must not be found after hours.

    The test rows are only looked at: turning them into ids is part of what answering costs, and is measured with it.

    Raises:
        BadData: rows that are too long for one of the methods, or with the solved examples in front.
    """
    virtual = _most_virtual(configs)
    rows = training_rows(base, task, virtual)
    examples.encode(task, task.examples(Split.TEST), encoder_for(base, virtual))
    for _, shots in _prompting(task, plan):
        if shots:
            examples.encode(task, task.examples(Split.TEST), encoder_for(base), shots)
    return rows


def _most_virtual(configs: Mapping[str, MethodConfig]) -> int:
    return max((method_named(kind).virtual_tokens(config) for kind, config in configs.items()), default=0)


def _prompting(task: Task, plan: Plan) -> Iterator[tuple[str, tuple[Example, ...]]]:
    yield "zero-shot", ()
    if plan.shots:
        yield "few-shot", tuple(task.shots(plan.shots, plan.seeds[0]))


def _measure_prompting(
    base: Base, task: Task, name: str, shots: tuple[Example, ...], found: Finished, progress: Progress
) -> None:
    if found.take(name, 0):
        return
    rows = task.examples(Split.TEST)
    progress.stage(name, len(rows), "rows")
    with measured() as cost:
        encoded = examples.encode(task, rows, encoder_for(base), shots)
        answers = examples.answer(base, task, encoded, progress=progress.advance)
    measurement = evaluation(task, examples.judge(task, encoded, answers))
    entry = _entry(measurement, name, Strategy.PROMPTING, 0, cost)
    found.add(entry, measurement.results)
    progress.say(_line(entry, progress.lang))


def _ahead(first: Entry, task: Task, plan: Plan) -> float:
    """Seconds that the rest will take; 0: nothing follows."""
    return work(task, plan).seconds(first.seconds_per_1000_rows / 1000, scopes(plan))


def work(task: Task, plan: Plan) -> Work:
    """What there is to do, apart from the methods."""
    return Work(
        train=len(task.examples(Split.TRAIN)),
        dev=len(task.examples(Split.DEV)),
        test=len(task.examples(Split.TEST)),
        epochs=plan.training.epochs,
        evaluations=plan.training.evaluations,
        seeds=len(plan.seeds),
        rates=1 if plan.training.learning_rate else len(plan.rates),
        share=plan.search_share,
        few_shot=plan.shots > 0,
    )


def scopes(plan: Plan) -> list[Scope]:
    """How far the gradients of each method reach."""
    return [method_named(kind).scope for kind in plan.methods]


def _measure_method(
    base: Base,
    task: Task,
    kind: str,
    config: MethodConfig,
    plan: Plan,
    rows: TrainingRows,
    found: Finished,
    probe: ForgettingProbe,
    progress: Progress,
) -> None:
    def trial(seed: int, rate: float) -> Trial:
        return Trial(base, task, config, plan.training, rate, seed, rows=rows)

    first, *others = plan.seeds
    rates = _rates(kind, plan)
    entry = found.take(kind, first)
    if entry is None:
        leader, search = choose((trial(first, rate) for rate in rates), len(rates), plan.search_share, progress)
        entry = _measure_run(alone(leader, progress), search, found, probe, progress)
    assert entry.learning_rate is not None
    missing = [seed for seed in others if not found.holds(kind, seed)]
    runs = further(partial(trial, rate=entry.learning_rate), others, missing, len(rates), progress)
    for seed in others:  # in the plan's order, whatever was there before
        if found.take(kind, seed) is None:
            _measure_run(next(runs), entry.search, found, probe, progress)


def _rates(kind: str, plan: Plan) -> list[float]:
    if plan.training.learning_rate:
        return [plan.training.learning_rate]
    return sorted(method_named(kind).learning_rate * factor for factor in plan.rates)


def _measure_run(
    run: Trained, search: tuple[SearchPoint, ...], found: Finished, probe: ForgettingProbe, progress: Progress
) -> Entry:
    """Store what was trained, and measure what was stored."""
    trial = run.trial
    kind = trial.method.kind
    trained = sum(p.numel() for p in trial.delta.trainable().values())
    adaptation = trial.adaptation()
    stored = adaptation.save_below(found.out / ADAPTATIONS)
    with measured() as evaluation_cost:
        measurement = adaptation.evaluate(progress=progress)
    last = trial.curve[-1]
    entry = _entry(measurement, kind, trial.method.strategy, trial.seed, evaluation_cost).model_copy(
        update={
            "trainable_parameters": trained,
            "stored_bytes": stored.bytes,
            "train_seconds": last.seconds,
            "train_tokens_per_second": last.tokens / last.seconds,
            "train_peak_bytes": run.peak_bytes,
            "trained_beside": run.beside,
            "adaptation": str(stored.folder),
            "forgetting": probe.rise(adaptation.delta),
            "learning_rate": trial.learning_rate,
            "config": trial.config.model_dump(mode="json"),
            "train_rows": len(trial.task.examples(Split.TRAIN)),
            "best_step": trial.best.step if trial.best else last.step,
            "search": search,
            "curve": tuple(trial.curve),
        }
    )
    found.add(entry, measurement.results)
    progress.say(_line(entry, progress.lang))
    return entry


def _entry(measurement: Evaluation, name: str, strategy: Strategy, seed: int, cost: Cost) -> Entry:
    return Entry(
        method=name,
        strategy=strategy.value,
        seed=seed,
        metric=measurement.metric,
        score=measurement.score,
        low=measurement.low,
        high=measurement.high,
        n=measurement.n,
        trainable_parameters=0,
        stored_bytes=0,
        train_seconds=0.0,
        train_tokens_per_second=None,
        train_peak_bytes=None,
        eval_peak_bytes=cost.peak_bytes,
        seconds_per_1000_rows=1000 * cost.seconds / measurement.n,
        adaptation=None,
    )


def _line(entry: Entry, lang: Lang) -> str:
    score, low, high = (units.score(value, lang) for value in (entry.score, entry.low, entry.high))
    figures = {"metric": entry.metric, "score": score, "low": low, "high": high, "n": entry.n}
    return told("measured", lang, method=entry.method, seconds=f"{entry.train_seconds:.0f}", **figures)


def _comparison(base: Base, task: Task, plan: Plan, found: Finished, command: str) -> Comparison:
    facts = task.describe()
    pairs = compare_pairs(found.results)
    limits = caveats(
        found.entries,
        pairs,
        results=found.results,
        dev_rows=len(task.examples(Split.DEV)),
        train_rows_available=facts.get("rows_available", {}).get("train"),
        near_duplicates=facts.get("near_duplicates", 0),
    )
    return Comparison(
        entries=tuple(found.entries),
        pairs=pairs,
        caveats=tuple(caveat_text(limit) for limit in limits),
        caveat_keys=limits,
        base=base_ref(base).model_dump(mode="json") | {"bytes": base.bytes},
        task=facts,
        training=plan.model_dump(mode="json", exclude={"configs", "methods"}),
        environment=environment(),
        command=command,
    )


def _document(base: Base, task: Task, plan: Plan, configs: Mapping[str, MethodConfig]) -> dict[str, object]:
    """Everything that decides the figures. The machine does too: times and memory of one table are of one machine."""
    spec = task.spec.model_dump(mode="json")
    return {
        "plan": plan.model_dump(mode="json", exclude={"configs"}),
        "configs": {kind: config.model_dump(mode="json") for kind, config in configs.items()},
        "task": spec,
        "data": data_digests(task),
        "base": base_ref(base).model_dump(mode="json", exclude={"name"}),
        "chat_template": chat_digest(base, spec),
        "environment": environment() | {"device": base.device.type},
    }


def environment() -> dict[str, object]:
    """The machine and the versions that figures were made with."""
    return {
        "tritune": version("tritune"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
