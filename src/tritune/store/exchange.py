"""Two folders change places in one step, on systems that can: there is no moment at which one of the names is missing.

Linux has it in `renameat2` (kernel 3.15, glibc 2.28), macOS in `renamex_np`; Python calls neither. Knows paths only.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
#: the system has the call but this file system has not, or the kernel has not
_NOT_HERE = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV})


def exchange(a: Path, b: Path) -> bool:
    """Let two folders change places; False: it cannot be done here, and nothing was.

    Raises:
        OSError: as of a rename; FileNotFoundError where one of them is missing.
    """
    code = _call(os.fsencode(a), os.fsencode(b))
    if code in _NOT_HERE:
        return False
    if code:
        raise OSError(code, os.strerror(code), str(b))
    return True


def _call(a: bytes, b: bytes) -> int:
    """0, or the error."""
    libc = _libc()
    if hasattr(libc, "renameat2"):
        done = libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_RENAME_EXCHANGE))
    elif hasattr(libc, "renamex_np"):
        done = libc.renamex_np(a, b, ctypes.c_uint(_RENAME_SWAP))
    else:
        return errno.ENOSYS
    return ctypes.get_errno() if done else 0


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
