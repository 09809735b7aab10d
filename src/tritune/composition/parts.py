"""What is asked of adaptations before they are put together, whatever the way: one base, one task. Knows no way."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from tritune.adaptation import Adaptation, Origin, base_ref, chat_digest
from tritune.errors import Problem
from tritune.run import Training
from tritune.spec import differences
from tritune.store.manifest import ref_misfits
from tritune.tasks.base import Task

#: what of a task decides what an answer means and what the base gets to read
MEANING = ("kind", "text_field", "labels", "label_words", "template")


def problems_of(parts: Sequence[Adaptation], task: Task | None) -> list[Problem]:
    """Other bases than the first part's, and other tasks where none was named."""
    if not parts:
        return [Problem("parts", "none was given")]
    found = []
    for i, part in enumerate(parts[1:], 2):
        misfits = ref_misfits(base_ref(parts[0].base), part.base.name, part.base.digests)
        found += [Problem(f"part {i}, {problem.where}", problem.what) for problem in misfits]
        if task is None:
            found += [
                Problem(f"part {i}, task, {p.where}", p.what) for p in differences(_meaning(parts[0]), _meaning(part))
            ]
    return found


def hint(problems: Sequence[Problem]) -> str:
    """What to do about tasks that differ."""
    differ = any(", task, " in problem.where for problem in problems)
    return "Say whose task is kept: --task-of 1 (in Python, task=parts[0].task)." if differ else ""


def _meaning(part: Adaptation) -> dict[str, object]:
    document = part.task.spec.model_dump(mode="json")
    return {name: document.get(name) for name in MEANING} | {"chat_template": chat_digest(part.base, document)}


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
