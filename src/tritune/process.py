"""Settings of the process for training: how memory is asked for and kept, how threads wait for each other. Made by programs
before they import torch, never by an import.

A training step frees hundreds of megabytes of activations and asks for them again. By default glibc hands large blocks back
to the system and gets them anew, page by page, each page cleared: several percent of a step. Knows no torch.
"""

from __future__ import annotations

import ctypes
import os
import platform

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


class _Own:
    process = False


def is_own() -> bool:
    """Whether nobody but tritune decides what runs in this process."""
    return _Own.process


def settle() -> None:
    """All of it, for a program that trains and does nothing else."""
    _Own.process = True
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let this process keep what it frees. False where the C library has no such setting (macOS, Windows, musl)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # 32 MiB is the largest threshold glibc takes; single larger blocks stay the system's
    settings = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: _MOST, _TOP_PAD: 2**26}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def give_back() -> None:
    """Hand pages that nothing lies in back to the system, where the C library can (glibc)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
