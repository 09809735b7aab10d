"""From a stored task document back to a task, by its kind. Knows the kinds of tasks; no model."""

from __future__ import annotations

from collections.abc import Mapping

from tritune.errors import Mismatch, Problem
from tritune.tasks.classification import Classification, ClassificationSpec


def spec_from_document(document: Mapping[str, object]) -> ClassificationSpec:
    """The spec of a stored task.

    Raises:
        Mismatch: an unknown kind, or a document that does not fit it.
    """
    if document.get("kind") != "classification":
        raise Mismatch("Unknown kind of task.", [Problem("kind", f"{document.get('kind')!r}, known: 'classification'")])
    return ClassificationSpec.read(dict(document), "task")


def task_from_document(document: Mapping[str, object]) -> Classification:
    """The task without rows: enough to predict."""
    return Classification.from_spec(spec_from_document(document))
