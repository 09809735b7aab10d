"""Finished bottleneck adapters under learned attention: `methods/fusion.py` says what that is. Only the attention trains."""

from __future__ import annotations

from collections.abc import Sequence

from tritune.adaptation import Adaptation
from tritune.composition.parts import made, problems_of
from tritune.errors import Mismatch
from tritune.methods.fusion import METHOD, Fusion, why_not
from tritune.methods.stack import of_part
from tritune.progress import Progress, Silent
from tritune.report.told import told
from tritune.run import Training
from tritune.tasks.base import Task
from tritune.train.state import TrainState
from tritune.trial import Trial, follow


def fuse(
    parts: Sequence[Adaptation],
    task: Task,
    *,
    value: bool = True,
    training: Training | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Adaptation:
    """Train attention over finished adapters on a task, and return the best step on dev.

    Args:
        parts: two or more bottleneck adapters of one base, with the same placement. They stay as they are and are stored
            with the result, which needs none of them afterwards. Their own tasks may be any.
        task: what is learned now, with rows to train on.
        value: whether the weighted sum goes through a matrix of its own.

    Raises:
        Mismatch: with every reason why these cannot be fused.
        BadData: rows that cannot be trained on.
        Diverged: a loss or gradient was not finite.
    """
    trial = fusion_of(parts, task, value=value, training=training or Training(), seed=seed)
    progress = progress or Silent()
    name = told("train", progress.lang, method=trial.method.kind)
    follow(trial.events(), progress, name, trial.total_steps)
    return trial.adaptation()


def fusion_of(
    parts: Sequence[Adaptation],
    task: Task,
    *,
    value: bool,
    training: Training,
    seed: int,
    resume: TrainState | None = None,
) -> Trial:
    """The run that `fuse` carries out, to be gone through step by step.

    Args:
        resume: a saved state of the same run.

    Raises:
        Mismatch, BadData: as `fuse`.
    """
    configs = [part.config for part in parts]
    problems = [*problems_of(parts, task), *why_not(configs)]
    Mismatch.check("These adaptations cannot be fused.", problems)
    config = Fusion.read({"parts": [c.model_dump(mode="json") for c in configs], "value": value}, "the fusion")
    learned = {name: t for i, part in enumerate(parts) for name, t in of_part(i, part.delta.export()).items()}
    rate, record = training.learning_rate or METHOD.learning_rate, made("fused", parts)
    return Trial(parts[0].base, task, config, training, rate, seed, resume=resume, learned=learned, made=record)
