"""How long work shows itself on standard error: one live bar on a terminal, sparse plain lines elsewhere, or nothing.

Implements `tritune.progress.Progress`. Knows stages and figures; no model and no command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from tritune.progress import Progress, Silent
from tritune.report import units
from tritune.report.told import told

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tritune.report.words import Lang

#: seconds between two plain lines of one stage
EVERY = 15.0
#: redraws per second: drawing takes time from the work
REDRAWS = 2.0


@contextmanager
def shown(*, quiet: bool, lang: Lang = "en") -> Iterator[Progress]:
    """The progress that suits standard error; the bar is gone when the context ends, however it ends."""
    if quiet:
        yield Silent()
        return
    console = Console(stderr=True, highlight=False)
    progress = Terminal(console, lang) if console.is_terminal else Plain(console, lang)
    try:
        yield progress
    finally:
        progress.close()


@dataclass
class Stage:
    """One stretch of work, and how its state is told. A total of 0: nobody knows how much there is to do."""

    name: str
    total: float
    unit: str
    lang: Lang = "en"
    done: float = 0.0
    started: float = field(default_factory=lambda: time.monotonic())
    figures: dict[str, float] = field(default_factory=dict)
    memory: str = ""

    def advance(self, amount: float, figures: Mapping[str, float | None]) -> None:
        self.done += amount
        self.memory = peak_memory(self.lang)
        self.figures |= {name: value for name, value in figures.items() if value is not None}

    def counted(self) -> str:
        if not self.total:
            return ""
        done, total = (units.whole(round(value), self.lang) for value in (self.done, self.total))
        return told(self.unit, self.lang, counted=f"{done}/{total}")

    def told(self) -> str:
        """Speed and the newest figures."""
        shown = dict(self.figures)
        speed = shown.pop("tokens_per_second", None)
        parts = [] if speed is None else [told("speed", self.lang, rate=units.rate(speed, self.lang))]
        return " ".join(parts + [f"{name} {units.score(value, self.lang)}" for name, value in shown.items()])

    def left(self) -> str:
        """Time left at the pace so far; nothing while there is no pace."""
        if not self.done or self.done >= self.total:
            return ""
        seconds = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return told("left", self.lang, time=units.seconds(max(1.0, seconds), self.lang))


def peak_memory(lang: Lang) -> str:
    """The most memory held at once since it was last measured: of this process, or on a GPU what torch took there."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return told("peak", lang, size=units.size(torch.cuda.max_memory_allocated(), lang))
    if sys.platform == "win32":
        import psutil

        return told("peak", lang, size=units.size(psutil.Process().memory_info().peak_wset, lang))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return told("peak", lang, size=units.size(peak if sys.platform == "darwin" else 1024 * peak, lang))


class Terminal:
    """One bar for the current stage, and the lines worth keeping above it."""

    def __init__(self, console: Console, lang: Lang = "en") -> None:
        self.lang: Lang = lang
        columns = ("name", "counted", "told", "left", "memory")
        texts = [
            TextColumn(f"{{task.fields[{name}]}}", style="" if name == "name" else "dim", markup=False)
            for name in columns
        ]
        self._bars = Bars(
            texts[0],
            BarColumn(bar_width=16),
            *texts[1:],
            console=console,
            transient=True,
            redirect_stdout=False,  # standard output is for results only
            refresh_per_second=REDRAWS,
        )
        self._stage: Stage | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, total: float, unit: str) -> None:
        self.close()
        self._stage = Stage(name, total, unit, self.lang)
        self._task = self._bars.add_task("", total=total or None, **self._fields())
        self._bars.start()

    def advance(self, amount: float, **figures: float | None) -> None:
        if self._stage is not None and self._task is not None:
            self._stage.advance(amount, figures)
            self._bars.update(self._task, advance=amount, **self._fields())

    def say(self, message: str) -> None:
        self._bars.console.print(Text(message))

    def close(self) -> None:
        """End the current stage and take its bar away."""
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._bars.stop()
        self._stage = self._task = None

    def _fields(self) -> dict[str, Any]:
        stage = self._stage
        assert stage is not None
        return {
            "name": stage.name,
            "counted": stage.counted(),
            "told": stage.told(),
            "left": stage.left(),
            "memory": stage.memory,
        }


class Plain:
    """A line when a stage begins, every now and then, and when it ends."""

    def __init__(self, console: Console, lang: Lang = "en") -> None:
        self.lang: Lang = lang
        self._console = console
        self._stage: Stage | None = None
        self._last = 0.0
        self._told = 0.0

    def stage(self, name: str, total: float, unit: str) -> None:
        self.close()
        self._stage = Stage(name, total, unit, self.lang)
        self._last, self._told = time.monotonic(), 0.0

    def advance(self, amount: float, **figures: float | None) -> None:
        if self._stage is None:
            return
        self._stage.advance(amount, figures)
        if time.monotonic() - self._last >= EVERY:
            self._tell(self._stage)

    def say(self, message: str) -> None:
        if self._stage is not None and self._stage.done >= self._stage.total:
            self.close()
        self._print(message)

    def close(self) -> None:
        """Tell how the current stage ended."""
        if self._stage is not None and self._stage.done > self._told:
            self._tell(self._stage)
        self._stage = None

    def _tell(self, stage: Stage) -> None:
        self._last, self._told = time.monotonic(), stage.done
        parts = (stage.counted(), stage.told(), stage.left(), stage.memory)
        self._print(f"{stage.name}: {', '.join(part for part in parts if part)}")

    def _print(self, message: str) -> None:
        # A log is cut at no width, and has plain spaces so that it can be searched.
        self._console.print(Text(message.replace(units.GAP, " ")), soft_wrap=True)
