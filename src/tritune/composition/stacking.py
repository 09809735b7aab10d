"""Finished adaptations that answer every row together, in a stated order: `methods/stack.py` says what that is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tritune.adaptation import Adaptation
from tritune.composition.parts import hint, origin_of, problems_of
from tritune.errors import Mismatch, Problem
from tritune.methods.stack import Stack, of_part, why_not
from tritune.spec import MethodConfig
from tritune.tasks.base import Task


def stack(parts: Sequence[Adaptation], *, task: Task | None = None) -> Adaptation:
    """One adaptation in which all parts act on every row, each upon those before it. No number of theirs changes.

    Args:
        parts: adaptations of one base. A stack among them stands for its parts.
        task: what the answers mean, where the parts' tasks differ; None: they all have the same.

    Raises:
        Mismatch: with every reason why these cannot be stacked.
    """
    flat = [member for part in parts for member in _members(part)]
    configs = [config for config, _ in flat]
    problems = [*problems_of(parts, task), *why_not(configs)]
    Mismatch.check("These adaptations cannot be stacked.", problems, hint(problems))
    tensors = {name: t for i, (_, own) in enumerate(flat) for name, t in of_part(i, own).items()}
    config = Stack.of(configs)
    return Adaptation(parts[0].base, task or parts[0].task, config, tensors, origin_of("stacked", parts))


def reasons(configs: Sequence[MethodConfig]) -> list[Problem]:
    """Every reason why adaptations of these settings cannot be stacked. Nothing is loaded yet."""
    whole = [[part.config for part in c.parts] if isinstance(c, Stack) else [c] for c in configs]
    return why_not([config for own in whole for config in own])


def _members(part: Adaptation) -> list[tuple[MethodConfig, dict[str, Tensor]]]:
    if isinstance(part.config, Stack):
        return part.config.split(part.delta.export())
    return [(part.config, part.delta.export())]
