"""The language of tables, reports and explanations: what was asked for, else the locale's, else English."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tritune.report.words import Lang


class Language(StrEnum):
    EN = "en"
    RU = "ru"


def language(chosen: Language | None) -> Lang:
    """The language to speak."""
    if chosen is not None:
        return "ru" if chosen is Language.RU else "en"
    return "ru" if _locale().lower().startswith("ru") else "en"


def _locale() -> str:
    # In the order of POSIX: the first that is set decides, even if it says C.
    return next((value for name in ("LC_ALL", "LC_MESSAGES", "LANG") if (value := os.environ.get(name))), "")
