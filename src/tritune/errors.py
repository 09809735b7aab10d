"""Every exception tritune raises on purpose: one root, one tree.

A user error says what, where, what was expected and what to do. `Mismatch` collects every problem before it raises,
so nobody repairs ten mistakes in ten rounds. Our own bugs are plain `assert`s. Knows nothing of the rest of the package.

    TrituneError            exit code 1
      Mismatch              2   input that does not fit: files, configs, tensors; carries all problems
        BadData             2   rows of a data file
        BadSettings         2   settings made in Python; also a ValueError
      Unavailable           3   something could not be fetched (offline, unknown name)
      UnsupportedBase       4   a base whose family is unknown, or that fails the packed = solo probe
      NotMergeable          4   this method cannot be merged into the base; says why
      Diverged              5   a loss or gradient stopped being finite; nothing was updated with it
      Interrupted           6   stopped by the user; the run can be resumed
      StorageError          7   could not write (no space, read-only)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class TrituneError(Exception):
    """The root. `exit_code` is what the command line returns for it."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `where` is as exact as it can be ("train.csv, line 7, field 'label'")."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class Mismatch(TrituneError):
    """Input that does not fit, with every problem found.

    Args:
        title: one sentence on what was being attempted.
        problems: all misfits; the message shows the first `shown` and counts the rest.
        hint: what to do about it.
    """

    exit_code = 2
    shown = 20

    def __init__(self, title: str, problems: Iterable[Problem] = (), hint: str = "") -> None:
        self.title = title
        self.problems = tuple(problems)
        self.hint = hint
        lines = [title]
        lines += [f"  - {problem}" for problem in self.problems[: self.shown]]
        if len(self.problems) > self.shown:
            lines.append(f"  ... and {len(self.problems) - self.shown} more")
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))

    @classmethod
    def check(cls, title: str, problems: Iterable[Problem], hint: str = "") -> None:
        """Raise if there is any problem, with all of them."""
        found = tuple(problems)
        if found:
            raise cls(title, found, hint)


class BadData(Mismatch):
    """Rows of a data file that cannot be used."""


class BadSettings(Mismatch, ValueError):
    """Settings made in Python that cannot be used, with every one that does not fit."""


class Unavailable(TrituneError):
    """Something had to be fetched and could not be."""

    exit_code = 3


class UnsupportedBase(TrituneError):
    """This base cannot be used: unknown family, or it mixes tokens outside attention."""

    exit_code = 4


class NotMergeable(TrituneError):
    """The method has no equal inside the base's own weights; the message says why."""

    exit_code = 4


class Diverged(TrituneError):
    """A loss or gradient was not finite. The step was not taken."""

    exit_code = 5


class Interrupted(TrituneError):
    """The user stopped the run; the last saved state can be resumed."""

    exit_code = 6


class StorageError(TrituneError):
    """A file could not be written; what was there before is untouched."""

    exit_code = 7
