"""Work in a process of its own, to be killed, robbed of its rights or raced against; `os.fork`, so nothing is imported twice.

Tensors in there stay small: torch's threads do not survive a fork.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

NOBODY = 65534
Work = Callable[[], None]


def start(work: Work) -> int:
    """Start it; the process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(60)
        work()
        status = 0
    except BaseException:  # noqa: BLE001  # a failed assertion becomes the exit status
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """Its exit status, negative for the signal that killed it."""
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def run(work: Work) -> int:
    return wait(start(work))


def race(*works: Work) -> list[int]:
    """All at once; their exit statuses."""
    return [wait(pid) for pid in [start(work) for work in works]]


def die() -> None:
    """As a machine that loses power."""
    os.kill(os.getpid(), signal.SIGKILL)


def as_nobody(work: Work) -> Work:
    """Permissions do not bind the superuser."""

    def with_few_rights() -> None:
        if os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    return with_few_rights
