"""`tritune show`: one stored adaptation in full, and whether its files are still what they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tritune.cli import options
from tritune.cli.list import document
from tritune.cli.loading import stored_at
from tritune.cli.scores import base_bytes_of, score_of
from tritune.cli.screen import echo_json, page
from tritune.errors import Mismatch
from tritune.report import units
from tritune.store.registry import MISSING

if TYPE_CHECKING:
    from tritune.store.registry import Stored


def show(adaptation: options.Adaptation, as_json: options.AsJson = False) -> None:
    """Show what an adaptation is and what it belongs to: method, base, task, training, files.

    Exit code 2 when a file is missing or was changed.

    Example:
      tritune show 4f2a9c
    """
    stored = stored_at(adaptation)
    problems = list(stored.damage())
    broken = {problem.where: problem.what for problem in problems}
    states = {name: _state(wanted, broken.get(name)) for name, wanted in stored.manifest.files.items()}
    if as_json:
        echo_json(document(stored) | {"files": states, "manifest": stored.manifest.model_dump(mode="json")})
    else:
        _print(stored, states)
    Mismatch.check(f"{stored.folder} is damaged or was changed.", problems, "Get a fresh copy.")


def _print(stored: Stored, states: Mapping[str, str]) -> None:
    facts = (*_facts(stored), *((f"file {name}", state) for name, state in states.items()))
    console = page()
    if not console.is_terminal:  # in a file or a pipe every fact is a line
        width = max(len(name) for name, _ in facts)
        console.print("\n".join(f"{name:<{width}}  {value}" for name, value in facts), soft_wrap=True)
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    console.print(table)


def _state(wanted: str, problem: str | None) -> str:
    if problem == MISSING:
        return problem
    return f"{'CHANGED since it was stored' if problem else 'intact'}, sha256 {wanted}"


def _facts(stored: Stored) -> Iterator[tuple[str, str]]:
    manifest = stored.manifest
    yield "id", stored.id
    yield "folder", str(stored.folder)
    yield "method", f"{manifest.method} ({manifest.strategy.value})"
    yield from ((f"  {name}", str(value)) for name, value in manifest.config.items())
    if manifest.made is not None:
        yield from ((f"made: {name}", _plain(value)) for name, value in manifest.made.items())
    if known := score_of(stored):
        score, low, high = (units.score(float(str(known[key])), "en") for key in ("score", "low", "high"))
        yield "score", f"{known['metric']} {score} [{low}, {high}] (95 %, n = {known['n']} test rows)"
    numbers = sum(_product(shape) for shape in manifest.tensors.values())
    yield (
        "stored",
        f"{units.size(stored.bytes, 'en')}, {units.whole(numbers, 'en')} numbers in {len(manifest.tensors)} tensors",
    )
    form = f", weights in {manifest.base.quantised}" if manifest.base.quantised else ""
    yield "base", f"{manifest.base.name}, {manifest.base.dtype}{form}"
    if size := base_bytes_of(stored):
        yield "  in memory", units.size(size, "en")
    yield from ((f"  {part}", f"sha256 {value}") for part, value in manifest.base.digests.model_dump().items())
    yield "task", str(manifest.task.get("kind"))
    for name in ("text_field", "label_field", "label_words", "labels"):
        if name in manifest.task:
            yield f"  {name}", _plain(manifest.task[name])
    template = manifest.task.get("template")
    yield "template", repr(template.get("context")) if isinstance(template, dict) else str(template)
    yield "  digest", f"sha256 {manifest.template}"
    yield "training", f"{manifest.steps} steps, learning rate {manifest.learning_rate:g}, seed {manifest.seed}"
    yield from ((f"  {name}", str(value)) for name, value in manifest.training.model_dump().items())
    yield from ((f"data {split}", f"sha256 {value}") for split, value in manifest.data.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} = {words}" for key, words in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
