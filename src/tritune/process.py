"""Settings of the process for training: how memory is asked for and kept, how threads wait for each other. Made by programs
before they import torch, never by an import. Some are read when a process starts: the command starts over with them.

A training step frees hundreds of megabytes of activations and asks for them again. By default glibc hands large blocks back
to the system and gets them anew, page by page, each page cleared: several percent of a step. Knows no torch.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

# names and numbers of <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_MOST = 2**31 - 1

#: Read by libraries when they are loaded or at their first tensor; what the user has set stays.
ENVIRONMENT = {
    # Products that oneDNN has at hand, one for every shape it met (1,024 otherwise): half a megabyte each in bf16. A step has
    # some 40 of them, and to make one takes 0.2 ms.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    # Rounds that a thread with nothing to do turns before it lets another program have its core. By default that is some
    # milliseconds; where there is more to do than cores, threads then wait for each other: a step took eight times as long.
    "GOMP_SPINCOUNT": "10000",
}

_TUNABLES = "GLIBC_TUNABLES"
#: glibc otherwise sets small pieces aside when they are freed. Between large tensors they keep the holes on their two sides
#: apart, and a step takes a tenth more memory than what lies in it.
TUNABLES = {"glibc.malloc.tcache_count": "0", "glibc.malloc.mxfast": "0"}
#: where one of these is, what a step takes is memory of a GPU, and time is what a processor needs to launch it
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
#: says to a process that it has started over; its number stays what it was
_STARTED = "_TRITUNE_STARTED_OVER"


class _Own:
    process = False


def is_own() -> bool:
    """Whether nobody but tritune decides what runs in this process."""
    return _Own.process


def settle() -> None:
    """All that a running process can still set, for a program that trains and does nothing else."""
    _Own.process = True
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


def start_over() -> None:
    """Put the same process in the place of this one, which has done nothing yet, with what glibc reads at the start. Where
    that is set already, or there is no glibc, or somebody watches the process (a debugger), or the system does not allow
    it: nothing. Never more than once."""
    wanted = environment(os.environ)
    watched = sys.gettrace() is not None or sys.getprofile() is not None
    again = os.environ.get(_STARTED) == str(os.getpid())
    if wanted.get(_TUNABLES) != os.environ.get(_TUNABLES) and sys.executable and not watched and not again:
        with suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted | {_STARTED: str(os.getpid())})


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """An environment with the settings in it. What it says already stays."""
    wanted = {**ENVIRONMENT, **given}
    if _is_glibc() and not any(Path(device).exists() for device in _GPUS):
        told = [part for part in given.get(_TUNABLES, "").split(":") if part]
        known = {part.partition("=")[0] for part in told}
        wanted[_TUNABLES] = ":".join(
            told + [f"{name}={value}" for name, value in TUNABLES.items() if name not in known]
        )
    return wanted


def keep_freed_memory() -> bool:
    """Let this process keep what it frees. False where the C library has no such setting (macOS, Windows, musl)."""
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # 32 MiB is the largest threshold glibc takes; single larger blocks stay the system's
    settings = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: _MOST, _TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def give_back() -> None:
    """Hand pages that nothing lies in back to the system, where the C library can (glibc)."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
