"""Where to compute: a device that torch has here, or an error that says which ones it has."""

from __future__ import annotations

import torch

from tritune.errors import Mismatch, Problem


def device_named(name: str | None) -> str:
    """The device meant; None: the first GPU, else the CPU.

    Raises:
        Mismatch: this machine, or this build of torch, does not have it.
    """
    here = available()
    if name is None:
        return "cuda" if "cuda:0" in here else "cpu"
    if name not in here and name not in {one.partition(":")[0] for one in here}:
        problem = Problem(f"device '{name}'", "torch has no such device here")
        raise Mismatch("This device cannot be used.", [problem], f"Devices here: {', '.join(here)}.")
    return name


def available() -> tuple[str, ...]:
    """The CPU, every GPU that CUDA shows, and Apple's."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    apple = ("mps",) if torch.backends.mps.is_available() else ()
    return ("cpu", *(f"cuda:{i}" for i in range(gpus)), *apple)
