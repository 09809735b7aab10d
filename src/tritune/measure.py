"""What a stretch of work cost: seconds and peak memory. Knows the operating system; nothing of models."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tritune.process import give_back

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Filled when the block of `measured` ends."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured(*, anew: bool = True) -> Iterator[Cost]:
    """Wall time and peak memory of a block.

    Peak: resident memory of this process, libraries and base included; with a GPU, what torch had allocated there. On
    Linux the kernel's own high-water mark is reset first, so nothing short-lived is missed; elsewhere memory is sampled
    50 times a second.

    Args:
        anew: what earlier work freed is given back to the system first. It takes time to get it again.
    """
    cost = Cost()
    if anew:
        gc.collect()
        give_back()
    with _meter() as peak:
        start = time.perf_counter()
        try:
            yield cost
        finally:
            cost.seconds = time.perf_counter() - start
            cost.peak_bytes = peak()


@contextmanager
def _meter() -> Iterator[Callable[[], int]]:
    """A function that tells the peak so far, in bytes."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
    elif _reset_high_water():
        yield _high_water
    else:
        with _sampled() as peak:
            yield peak


def _reset_high_water() -> bool:
    try:
        _RESET.write_text("5")
        _high_water()
    except (OSError, StopIteration):
        return False
    return True


def _high_water() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextmanager
def _sampled() -> Iterator[Callable[[], int]]:
    import psutil

    process = psutil.Process()
    peak = [process.memory_info().rss]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: max(peak[0], process.memory_info().rss)
    finally:
        done.set()
        thread.join()
