"""Ctrl-C and SIGTERM as a wish: the work looks at it where it can stop without loss. A second one acts at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_wish() -> Iterator[Callable[[], bool]]:
    """A function that tells whether to stop. In the context the first signal only sets it."""
    wished: list[int] = []
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def wish(number: int, frame: FrameType | None) -> None:
        wished.append(number)
        restore()

    for number in _SIGNALS:
        signal.signal(number, wish)
    try:
        yield lambda: bool(wished)
    finally:
        restore()
