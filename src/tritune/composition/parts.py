"""What is asked of adaptations before they are put together, whatever the way: one base, one task. Knows no way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from tritune.adaptation import Adaptation, Origin, base_ref, chat_digest, config_of
from tritune.errors import Mismatch, Problem
from tritune.run import BaseRef, Training
from tritune.spec import MethodConfig, differences
from tritune.store.manifest import ref_misfits
from tritune.store.registry import Stored
from tritune.tasks.base import Task

#: what of a task decides what an answer means and what the base gets to read
MEANING = ("kind", "text_field", "labels", "label_words", "template")


def problems_of(parts: Sequence[Adaptation], task: Task | None) -> list[Problem]:
    """Other bases than the first part's, and other tasks where none was named."""
    known = [(base_ref(part.base), _meaning_of(part)) for part in parts]
    return _problems(known, task_named=task is not None)


def check_stored(
    way: str,
    every: Sequence[Stored],
    reasons: Callable[[Sequence[MethodConfig]], Iterable[Problem]],
    *,
    task_named: bool,
) -> None:
    """What the manifests tell, before a base is loaded.

    Args:
        way: "stacked", ...
        reasons: why adaptations of these settings cannot be put together so.

    Raises:
        Mismatch: with every reason, damaged files included.
    """
    damage = [Problem(f"{one.folder}, {p.where}", p.what) for one in every for p in one.visible_damage()]
    known = [(one.manifest.base, _meaning(one.manifest.task, one.manifest.chat_template)) for one in every]
    problems = [*_problems(known, task_named=task_named), *reasons([config_of(one) for one in every])]
    Mismatch.check(f"These adaptations cannot be {way}.", [*damage, *problems], hint(problems))


def _problems(known: Sequence[tuple[BaseRef, Mapping[str, object]]], *, task_named: bool) -> list[Problem]:
    if not known:
        return [Problem("parts", "none was given")]
    found = []
    (first, meaning), *others = known
    for i, (base, own) in enumerate(others, 2):
        misfits = ref_misfits(first, base.name, base.digests)
        found += [Problem(f"part {i}, {problem.where}", problem.what) for problem in misfits]
        if not task_named:
            found += [Problem(f"part {i}, task, {p.where}", p.what) for p in differences(meaning, own)]
    return found


def hint(problems: Sequence[Problem]) -> str:
    """What to do about tasks that differ."""
    differ = any(", task, " in problem.where for problem in problems)
    return "Say whose task is kept: --task-of 1 (in Python, task=parts[0].task)." if differ else ""


def _meaning_of(part: Adaptation) -> dict[str, object]:
    document = part.task.spec.model_dump(mode="json")
    return _meaning(document, chat_digest(part.base, document))


def _meaning(task: Mapping[str, object], chat_template: str | None) -> dict[str, object]:
    return {name: task.get(name) for name in MEANING} | {"chat_template": chat_template}


def origin_of(how: str, parts: Sequence[Adaptation], **options: object) -> Origin:
    """Of what was put together and not trained."""
    return Origin(Training(), 0.0, 0, 0, {}, made(how, parts, **options))


def made(how: str, parts: Sequence[Adaptation], **options: object) -> dict[str, object]:
    """The record: the way, its options, and each part by content."""
    named = [{"method": part.method.kind, "tensors": _digest(part)} for part in parts]
    return {"how": how, **options, "parts": named}


def _digest(part: Adaptation) -> str:
    """sha256 (hex) of names, shapes and numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(part.delta.export().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
