"""One method on one base for one task: choose nothing, train, keep what serving needs.

`Trial` is the piece that comparisons are made of: a run that can pause (to see which learning rate leads) and go on.
Knows tasks, bases, methods and the loop; no statistics, no report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from tritune.adaptation import Adaptation, Origin, base_ref, chat_digest, encoder_for
from tritune.errors import BadData, Diverged, Mismatch, Problem
from tritune.evaluate import examples
from tritune.evaluate.examples import Rows
from tritune.evaluate.record import CurvePoint
from tritune.methods import method as method_named
from tritune.methods import method_of, not_alone
from tritune.methods.base import Delta, misfits
from tritune.models.pretrained import Base
from tritune.models.texts import Ids
from tritune.progress import Progress, Silent
from tritune.report.told import told
from tritune.run import Run, Training
from tritune.spec import MethodConfig, digest
from tritune.tasks.base import Example, Split, Task
from tritune.train.loop import Event, Measured, total_steps, train
from tritune.train.state import TrainState
from tritune.train.together import train_together
from tritune.train.trainer import Job


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """What a run learns from and what it looks at, as ids: the same for every method, rate and seed on a base."""

    train: Rows
    dev: Rows


def training_rows(base: Base, task: Task, virtual: int = 0) -> TrainingRows:
    """The rows of a task as ids, with room for so many virtual tokens in front of each.

    Raises:
        BadData: there is nothing to learn from, or rows that are too long.
    """
    encoder = encoder_for(base, virtual)
    train = examples.encode(task, _needed(task, Split.TRAIN), encoder)
    return TrainingRows(train, examples.encode(task, task.examples(Split.DEV), encoder))


def check_rows(task: Task, training: Training) -> None:
    """Whether there are rows to learn from and to look at.

    Raises:
        BadData: none to learn from.
        Mismatch: none to choose the best step on, though it is to be chosen.
    """
    _needed(task, Split.TRAIN)
    if training.evaluations and not task.examples(Split.DEV):
        raise Mismatch("There are no dev rows to choose the best step on.", hint="Give some, or set evaluations to 0.")


@dataclass
class Trial:
    """One run of one method: everything that can change its result, and where it stands.

    Args:
        resume: a saved state of the same run. It is taken over, not copied.
        rows: the task's rows, where they are encoded already, with room for this method's virtual tokens.
        learned: what was learned before and stays, for a method that begins with finished parts.
        made: the record of those parts.
    """

    base: Base
    task: Task
    config: MethodConfig
    training: Training
    learning_rate: float
    seed: int
    resume: TrainState | None = None
    rows: TrainingRows | None = None
    learned: Mapping[str, Tensor] | None = None
    made: Mapping[str, object] | None = None
    delta: Delta = field(init=False)
    curve: list[CurvePoint] = field(init=False, default_factory=list)
    best_step: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.method = method_of(self.config)
        learned, self.learned = self.learned or {}, None
        Mismatch.check(
            f"'{self.method.kind}' is made of finished adaptations, and cannot begin without just these tensors of theirs.",
            misfits(learned, self.method.learned_before(self.config, self.base)),
            "`tritune compose` puts finished adaptations together.",
        )
        self.delta = self.method.init(self.config, self.base, torch.Generator().manual_seed(self.seed))
        if learned:
            self.delta.restore({**self.delta.state(), **learned})
        rows = self.rows or training_rows(self.base, self.task, self.method.virtual_tokens(self.config))
        self._train, self._dev = rows.train, rows.dev
        check_rows(self.task, self.training)

    def events(
        self,
        *,
        until: int | None = None,
        save: Callable[[TrainState], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[Event]:
        """Train on, to the end, to step `until` or until `stop` says so; then `save` has had the state to go on from, in
        tensors that training goes on in: it writes them, or takes `kept()`.

        Raises:
            Diverged: a loss or gradient is not finite.
        """
        resume, self.resume = self.resume, None
        self.curve = list(resume.facts.curve) if resume else []
        self.best_step = resume.facts.best.step if resume and resume.facts.best else None
        events = train(
            self.training,
            self.base,
            self.delta,
            self._train.encoded,
            learning_rate=self.learning_rate,
            seed=self.seed,
            evaluate=self._evaluate if self.training.evaluations else None,
            save=save,
            resume=resume,
            until=until,
            stop=stop,
        )
        del resume  # the loop takes it over; a name here would keep a copy of every weight through the whole run
        with self.base.remembering(_seen_again([self])):
            for event in events:
                self._note(event)
                yield event

    def _note(self, event: Event) -> None:
        if event.kind in ("step", "evaluation"):
            self.curve.append(event.point)
        if event.best:
            self.best_step = event.step

    def job(self, until: int | None, save: Callable[[TrainState], None] | None) -> Job:
        """The run from its start to step `until` (None: to its end), to be trained beside others."""
        assert self.resume is None, "a run that was begun goes on alone"
        evaluate = self._evaluate if self.training.evaluations else None
        rows, rate = self._train.encoded, self.learning_rate
        return Job(self.training, self.delta, rows, rate, self.seed, evaluate, save, until)

    def _seen_again(self) -> Iterator[tuple[Ids, Ids]]:
        """Texts that go through the base more than once in this run, and what of their answers does."""
        for row in self._train.encoded if self.training.epochs > 1 else ():
            yield row.context, row.target[:-1]
        for row in self._dev.encoded if self.training.evaluations > 1 else ():
            for choice in row.choices:
                yield row.context, choice[:-1]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.training, self._train.encoded, self.seed)

    @property
    def best(self) -> CurvePoint | None:
        """The evaluation whose weights are kept; None: dev decided nothing, the last weights are."""
        looks = (point for point in self.curve if point.dev_score is not None)
        return next((point for point in looks if point.step == self.best_step), None)

    @property
    def latest(self) -> CurvePoint | None:
        """The newest look at dev."""
        return next((point for point in reversed(self.curve) if point.dev_score is not None), None)

    def _evaluate(self) -> Measured:
        answers = examples.answer(self.base, self.task, self._dev)
        results = examples.judge(self.task, self._dev, answers)
        return Measured(sum(r.score for r in results) / len(results), examples.mean_loss(self._dev, answers))

    def document(self) -> Run:
        """The run as a document."""
        return Run(
            base=base_ref(self.base),
            task=self.task.spec,
            chat_template=chat_digest(self.base, self.task.spec.model_dump(mode="json")),
            data=data_digests(self.task),
            method=self.method.kind,
            config=self.config,
            training=self.training.model_copy(update={"learning_rate": self.learning_rate}),
            seed=self.seed,
        )

    def adaptation(self) -> Adaptation:
        """What was learned, as it will be served. The training state goes."""
        tensors = self.delta.export()
        steps = self.curve[-1].step if self.curve else 0
        origin = Origin(self.training, self.learning_rate, self.seed, steps, data_digests(self.task), self.made)
        del self.delta
        return Adaptation(self.base, self.task, self.config, tensors, origin)


def events_together(
    trials: Sequence[Trial], *, until: int | None = None, save: Callable[[Trial, TrainState], None] | None = None
) -> Iterator[tuple[Trial, Event | Diverged]]:
    """Train fresh trials of one base in one pass over it, to step `until` or to their ends; one that diverges ends with
    that error.

    Raises:
        Mismatch: a trial replaces weights of the base.
    """
    base = trials[0].base
    jobs = [trial.job(until, partial(save, trial) if save else None) for trial in trials]
    with base.remembering(_seen_again(trials)):
        for i, event in train_together(base, jobs):
            if isinstance(event, Event):
                trials[i]._note(event)
            yield trials[i], event


def _seen_again(trials: Sequence[Trial]) -> dict[Ids, list[Ids]]:
    """Texts that go through the base more than once in these runs, with their answers."""
    found: dict[Ids, list[Ids]] = {}
    for trial in trials:
        for text, answer in trial._seen_again():
            found.setdefault(text, []).append(answer)
    return found


def adapt(
    base: Base,
    task: Task,
    *,
    method: MethodConfig | str = "lora",
    training: Training | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Adaptation:
    """Adapt a base to a task by one method, and return the best step on dev.

    Args:
        method: a config such as `tt.LoRA(rank=8)`, or a method's name for its defaults.
        training: how long and how fast; by default three passes at the method's own learning rate.

    Raises:
        BadData: rows that cannot be trained on.
        Diverged: a loss or gradient was not finite.
    """
    config = _named(method) if isinstance(method, str) else method
    training = training or Training()
    rate = training.learning_rate or method_of(config).learning_rate
    trial = Trial(base, task, config, training, rate, seed)
    progress = progress or Silent()
    name = told("train", progress.lang, method=trial.method.kind)
    follow(trial.events(), progress, name, trial.total_steps)
    return trial.adaptation()


def _named(kind: str) -> MethodConfig:
    """A method's defaults.

    Raises:
        Mismatch: unknown, or made of others.
    """
    Mismatch.check(f"'{kind}' needs more than its name.", not_alone(kind, {}))
    config: MethodConfig = method_named(kind).Config.read({}, f"method '{kind}'")
    return config


def follow(events: Iterator[Event], progress: Progress, name: str, until: int) -> list[Event]:
    """Run through events, up to step `until`, telling progress about each; returns them all."""
    seen: list[Event] = []
    score: float | None = None
    for event in events:
        if not seen:
            progress.stage(name, until - event.step + 1, "steps")
        seen.append(event)
        score = event.point.dev_score if event.point.dev_score is not None else score
        _tell(event, name, score, progress)
    return seen


def follow_together(
    trials: Sequence[Trial],
    names: Sequence[str],
    title: str,
    progress: Progress,
    *,
    until: int | None = None,
    save: Callable[[Trial, TrainState], None] | None = None,
) -> Iterator[tuple[Trial, Diverged]]:
    """Run through `events_together` as one stage, telling progress about each; yields those that diverge.

    Args:
        names: of each, where something is said of one.
    """
    steps = [min(trial.total_steps, until or trial.total_steps) for trial in trials]
    progress.stage(title, sum(steps), "steps")
    name_of = {id(trial): name for trial, name in zip(trials, names, strict=True)}
    score_of: dict[int, float] = {}
    for trial, event in events_together(trials, until=until, save=save):
        if isinstance(event, Diverged):
            yield trial, event
            continue
        if event.point.dev_score is not None:
            score_of[id(trial)] = event.point.dev_score
        _tell(event, name_of[id(trial)], score_of.get(id(trial)), progress)


def _tell(event: Event, name: str, score: float | None, progress: Progress) -> None:
    """`score`: the newest on dev."""
    point = event.point
    speed = point.tokens / point.seconds if point.seconds else None
    progress.advance(event.kind == "step", loss=point.train_loss, dev=score, tokens_per_second=speed)
    if event.kind == "stopped":
        progress.say(told("stopped_early", progress.lang, name=name))


def data_digests(task: Task) -> dict[str, str]:
    """Digest of the rows of each split: texts and labels, in order."""
    found: Mapping[Split, list[list[object]]] = {
        split: [[dict(row.fields), row.label] for row in task.examples(split)] for split in Split
    }
    return {split.value: digest(rows) for split, rows in found.items() if rows}


def _needed(task: Task, split: Split) -> tuple[Example, ...]:
    rows = tuple(task.examples(split))
    if not rows:
        raise BadData(f"The task has no {split} rows.", [Problem(split, "empty")], "Give labelled rows to learn from.")
    return rows
