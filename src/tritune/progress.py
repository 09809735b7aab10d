"""What long work tells about itself while it runs. The command line draws it; libraries and tests stay silent.

Knows stages and numbers; no terminal.
"""

from __future__ import annotations

from typing import Literal, Protocol


class Progress(Protocol):
    """Stages follow each other; each has a known amount of work. `lang`: what to tell it in."""

    lang: Literal["en", "ru"]

    def stage(self, name: str, total: float, unit: str) -> None:
        """A new stage begins: what it is, how much there is to do, of what ("steps" or "rows")."""
        ...

    def advance(self, amount: float, **figures: float | None) -> None:
        """So much more of the current stage is done; figures (loss, rate, score) describe the newest state."""
        ...

    def say(self, message: str) -> None:
        """A line worth keeping on the screen."""
        ...


class Silent:
    """Says nothing."""

    lang: Literal["en", "ru"] = "en"

    def stage(self, name: str, total: float, unit: str) -> None: ...

    def advance(self, amount: float, **figures: float | None) -> None: ...

    def say(self, message: str) -> None: ...
