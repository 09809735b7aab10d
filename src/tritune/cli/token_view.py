"""Rows as tokens for the eye: read ones and trained ones, their lengths, the labels. Knows ids and a console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tritune.tasks.base import Split, Task

if TYPE_CHECKING:
    from rich.console import Console

    from tritune.models.pretrained import Base
    from tritune.text.encode import Encoded

READ, TRAINED = "blue", "bold green"
BARS, BAR_WIDTH = 10, 40


def data(console: Console, task: Task) -> None:
    """Rows, labels and doubtful rows."""
    facts = task.describe()
    for split, source in facts.get("sources", {}).items():
        console.print(f"{split}: {source}", soft_wrap=True)
    if "dev" in facts:
        console.print(f"dev: {facts['dev']}", soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in ("label", "answered with", *(split.value for split in Split)):
        table.add_column(name, justify="left" if name in ("label", "answered with") else "right")
    for label, own in facts["labels"].items():
        table.add_row(Text(label), Text(own["words"]), *(f"{own[split.value]:,}" for split in Split))
    table.add_section()
    table.add_row("all", "", *(f"{facts['rows'][split.value]:,}" for split in Split))
    console.print(table)
    for name in ("repeated_rows", "contradicting_rows"):
        if counts := {split: n for split, n in facts[name].items() if n}:
            told = ", ".join(f"{split} {n:,}" for split, n in counts.items())
            console.print(f"{name.replace('_', ' ')}: {told}")
    for name in ("duplicates_across_splits", "near_duplicates"):
        if facts.get(name):
            console.print(f"{name.replace('_', ' ')}: {facts[name]:,}")


def rows(console: Console, tokenizer: Any, shown: Sequence[tuple[str, Encoded]]) -> None:
    """Some rows, token by token. The words stay readable without colour."""
    for where, row in shown:
        console.print(f"\n{where}", style="bold", soft_wrap=True)
        console.print(_line("read   ", tokenizer, row.context, READ))
        console.print(_line("trained", tokenizer, row.target, TRAINED))


def _line(name: str, tokenizer: Any, ids: Sequence[int], style: str) -> Text:
    text = Text(f"  {name} ({len(ids)} tokens) ", style="dim")
    for place, piece in enumerate(pieces(tokenizer, ids)):
        text.append("│" if place else "", style="dim")
        text.append(piece, style=style)
    return text


def pieces(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token; tokens that only together make a character stand as one, with their number."""
    waiting: list[int] = []
    for i in ids:
        waiting.append(i)
        text = str(tokenizer.decode(waiting, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and i != ids[-1]:
            continue
        visible = text.replace("\n", "⏎").replace("\t", "⇥")
        yield visible if len(waiting) == 1 else f"{visible}×{len(waiting)}"
        waiting = []


def lengths(console: Console, found: Mapping[Split, Sequence[int]], base: Base) -> None:
    """How long the rows are, in tokens, as bars."""
    every = sorted(length for own in found.values() for length in own)
    if not every:
        return
    middle = every[len(every) // 2]
    console.print(
        f"\ntokens per row: {every[0]} to {every[-1]}, half of the rows at most {middle}; "
        f"{base.name} takes {base.max_positions:,}",
        soft_wrap=True,
    )
    width = max(1, -(-(every[-1] - every[0] + 1) // BARS))
    counts = Counter((length - every[0]) // width for length in every)
    tallest = max(counts.values())
    for bar in range((every[-1] - every[0]) // width + 1):
        low = every[0] + bar * width
        drawn = "█" * round(BAR_WIDTH * counts[bar] / tallest) or ("▏" if counts[bar] else "")
        console.print(f"  {low:>6}–{low + width - 1:<6} {drawn} {counts[bar]:,}")
