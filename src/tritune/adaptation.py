"""An adaptation in use: a base, a task and what was learned, that predicts, is evaluated, saved and loaded.

What is measured is what is used: an adaptation always holds what its export holds, never the training state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tritune.errors import Mismatch, Problem, Unavailable
from tritune.evaluate import examples
from tritune.evaluate.record import ExampleResult
from tritune.evaluate.stats import mean_interval
from tritune.methods import method as method_named
from tritune.methods import method_of
from tritune.methods.base import Method
from tritune.models.load import load_base
from tritune.models.pretrained import Base
from tritune.progress import Progress, Silent
from tritune.report.told import told
from tritune.run import BaseRef, Training
from tritune.spec import MethodConfig, Quantisation, Quantise, digest
from tritune.store import registry
from tritune.store.manifest import Manifest, base_misfits
from tritune.store.registry import Stored
from tritune.tasks.base import Example, Split, Task
from tritune.tasks.stored import task_from_document
from tritune.text.encode import Encoder


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer. `probabilities` are the choices' likelihoods, made to sum to one."""

    text: str
    label: str
    probabilities: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores on labelled rows: mean and its 95 % interval, and every example behind it."""

    metric: str
    score: float
    low: float
    high: float
    n: int
    results: tuple[ExampleResult, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """How an adaptation came to be."""

    training: Training
    learning_rate: float
    seed: int
    steps: int
    data: Mapping[str, str]
    made: Mapping[str, object] | None = None  # of which adaptations it was put together, and how; None: it was trained


def encoder_for(base: Base, virtual: int = 0) -> Encoder:
    """An encoder whose limit leaves room for so many virtual tokens in front of every row."""
    return Encoder(base.tokenizer, base.max_positions - virtual)


class Adaptation:
    """What one method learned on one base for one task."""

    def __init__(
        self, base: Base, task: Task, config: MethodConfig, tensors: Mapping[str, Tensor], origin: Origin
    ) -> None:
        self.base = base
        self.task = task
        self.config = config
        self.method = method_of(config)
        self.origin = origin
        self.delta = self.method.load(config, base, tensors).eval().requires_grad_(False)

    def predict(
        self, rows: Sequence[str] | Sequence[Mapping[str, str]], *, progress: Progress | None = None
    ) -> list[Prediction]:
        """Answers to texts (or to rows, where the prompt shows more than one column).

        Raises:
            BadData: a row that cannot be used: empty, too long, a column missing.
        """
        return self.predict_examples(self.task.unlabelled(rows), progress=progress)

    def predict_examples(self, rows: Sequence[Example], *, progress: Progress | None = None) -> list[Prediction]:
        """As `predict`, for examples of a file."""
        progress = progress or Silent()
        encoded = examples.encode(self.task, rows, encoder_for(self.base, self.method.virtual_tokens(self.config)))
        progress.stage(told("predict", progress.lang), len(rows), "rows")
        with self.base.bind(self.delta):
            answers = examples.answer(self.base, self.task, encoded, progress=progress.advance)
        return [
            Prediction(self.task.shown(row), self.task.label_of(a) or a.text, self._shares(row, a.log_likelihoods))
            for row, a in zip(rows, answers, strict=True)
        ]

    def _shares(self, row: Example, log_likelihoods: Sequence[float]) -> dict[str, float]:
        top = max(log_likelihoods)
        weights = [math.exp(ll - top) for ll in log_likelihoods]
        return {label: w / sum(weights) for label, w in zip(self.task.answers, weights, strict=True)}

    def evaluate(self, *, split: Split = Split.TEST, progress: Progress | None = None) -> Evaluation:
        """Scores on a split of the task.

        Raises:
            Mismatch: the task has no rows there.
        """
        progress = progress or Silent()
        rows = self.task.examples(split)
        if not rows:
            raise Mismatch(
                f"The task has no {split} rows to evaluate on.", hint="Give labelled rows, e.g. with --test FILE."
            )
        encoded = examples.encode(self.task, rows, encoder_for(self.base, self.method.virtual_tokens(self.config)))
        progress.stage(told("evaluate", progress.lang, split=split), len(rows), "rows")
        with self.base.bind(self.delta):
            answers = examples.answer(self.base, self.task, encoded, progress=progress.advance)
        return evaluation(self.task, examples.judge(self.task, encoded, answers))

    # --- on disk ---

    def save(self, folder: str | Path) -> Stored:
        """Write the adaptation to exactly this folder, in place of an older adaptation there.

        Raises:
            Mismatch: the folder holds something else.
            StorageError: it could not be written; what was there is untouched.
        """
        return registry.save_as(Path(folder), self._manifest, **self._content())

    def save_below(self, root: Path) -> Stored:
        """Write the adaptation below `root`, in a folder named by its content hash."""
        return registry.save(root, self._manifest, **self._content())

    def _content(self) -> dict[str, Any]:
        if self.method.stores_base(self.config):
            return {"whole_base": lambda folder: self.base.save_pretrained(folder, self.delta.export())}
        return {"tensors": self.delta.export()}

    def _manifest(self, files: Mapping[str, str]) -> Manifest:
        spec = self.task.spec.model_dump(mode="json")
        return Manifest(
            method=self.method.kind,
            strategy=self.method.strategy,
            config=self.config.model_dump(mode="json"),
            base=base_ref(self.base),
            task=spec,
            template=digest(spec["template"]),
            chat_template=chat_digest(self.base, spec),
            files=files,
            tensors={name: tuple(shape) for name, shape in self.method.shapes(self.config, self.base).items()},
            training=self.origin.training,
            learning_rate=self.origin.learning_rate,
            seed=self.origin.seed,
            steps=self.origin.steps,
            data=self.origin.data,
            made=self.origin.made,
        )


def evaluation(task: Task, results: Sequence[ExampleResult]) -> Evaluation:
    """Mean and interval of judged examples."""
    scores = [result.score for result in results]
    low, high = mean_interval(scores)
    return Evaluation(task.metric, sum(scores) / len(scores), low, high, len(scores), tuple(results))


def base_ref(base: Base) -> BaseRef:
    return BaseRef(name=base.name, digests=base.digests, dtype=base.dtype_name, quantised=base.quantised)


def chat_digest(base: Base, task: Mapping[str, Any]) -> str | None:
    """Digest of the base's own chat template, where it writes the prompts of this task (a document); else None.

    It is no part of the tokenizer's digest: for prompts that do not use it, another one changes nothing.
    """
    is_chat = (task.get("template") or {}).get("kind") == "chat"
    return digest(base.tokenizer.chat_template) if is_chat else None


def load(
    ref: str | Path,
    *,
    base: Base | str | None = None,
    task: Task | None = None,
    quantise: Quantise | None = None,
    progress: Progress | None = None,
) -> Adaptation:
    """A stored adaptation on its base.

    Args:
        ref: its folder, or (the beginning of) its content hash.
        base: the base, or where it is now; None: the one named in the manifest, in the number format of its training.
        task: with rows to evaluate on; None: the stored task, without rows.
        quantise: the form of the base's weights, where it shall be another than in training: "int8", "nf4", "fp8" or
            "none". The answers are others then, usually by little: evaluate again.

    Raises:
        Mismatch: one error with everything that does not fit: base weights, their form, config, tokenizer, prompt
            template (and the base's chat template, where it writes the prompts), missing, surplus or misshapen tensors,
            damaged files.
        Unavailable: the base could not be fetched.
    """
    stored = registry.find(str(ref))
    manifest = stored.manifest
    config = config_of(stored)
    method = method_of(config)
    tensors, damage = stored.contents()
    form = form_of(manifest.base, quantise)
    if not isinstance(base, Base):
        base = _base_of(manifest, base, form, progress or Silent())
    Mismatch.check(
        f"The adaptation {stored.folder} does not fit.",
        [
            *base_misfits(manifest, base.name, base.digests),
            *_form_misfits(base, form),
            *_template_misfits(manifest, base, task),
            *damage,
            *(_tensor_misfits(method, config, base, tensors) if tensors else ()),
        ],
        "Use it with the base and the task it was trained with; get a fresh copy of damaged files.",
    )
    facts = (manifest.training, manifest.learning_rate, manifest.seed, manifest.steps, manifest.data)
    origin = Origin(*facts, made=manifest.made)
    return Adaptation(base, task or task_from_document(manifest.task), config, tensors, origin)


def config_of(stored: Stored) -> MethodConfig:
    """The settings of its method.

    Raises:
        Mismatch: a method that is not in the table, or settings that it does not know.
    """
    kind = method_named(stored.manifest.method).Config
    config: MethodConfig = kind.read(dict(stored.manifest.config), f"{stored.folder}/manifest.json, config")
    return config


def form_of(trained_on: BaseRef, quantise: Quantise | None) -> Quantisation | None:
    """The form a base is wanted in: that of the training, unless another is asked for."""
    if quantise is None:
        return trained_on.quantised
    return None if quantise == "none" else quantise


def _form_misfits(base: Base, form: Quantisation | None) -> list[Problem]:
    if base.quantised == form:
        return []
    here = base.quantised or "none"
    what = f"'{here}', expected '{form or 'none'}'; if it is meant to answer on this one, say quantise='{here}'"
    return [Problem("quantisation of the base", what)]


def _base_of(manifest: Manifest, ref: str | None, form: Quantisation | None, progress: Progress) -> Base:
    base = manifest.base
    try:
        return load_base(ref or base.name, dtype=base.dtype, quantise=form, progress=progress.say)
    except Unavailable as error:
        hint = "If the base lies in a folder or a file, say where: base=..., or --base."
        raise Unavailable(f"{error}\n{hint}") from None


def _tensor_misfits(
    method: Method[Any], config: MethodConfig, base: Base, tensors: Mapping[str, Tensor]
) -> Sequence[Problem]:
    try:
        return method.misfits(config, base, tensors)
    except Mismatch as error:  # the base lacks places where the method acts
        return error.problems


def _template_misfits(manifest: Manifest, base: Base, task: Task | None) -> list[Problem]:
    document = manifest.task if task is None else task.spec.model_dump(mode="json")
    found = digest(document.get("template"))
    problems = []
    if found != manifest.template:
        problems.append(Problem("prompt template", f"digest {found[:12]}, expected {manifest.template[:12]}"))
    chat = chat_digest(base, manifest.task)
    if chat != manifest.chat_template:
        wanted = manifest.chat_template[:12] if manifest.chat_template else "one that was not recorded"
        problems.append(
            Problem("chat template of the base", f"digest {str(chat)[:12]} of {base.name}, expected {wanted}")
        )
    if document.get("label_words") != manifest.task.get("label_words"):
        problems.append(
            Problem("labels", f"{document.get('label_words')}, expected {manifest.task.get('label_words')}")
        )
    return problems
