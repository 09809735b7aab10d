"""Tensors of a foreign folder: from safetensors, or from the pickle that some packages still write by default.

A pickle is opened by torch's reader for plain tensors, which builds nothing else and runs nothing; a file that holds
more is refused. Knows files, no format.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from tritune.errors import Mismatch, Problem
from tritune.store.files import read_tensors


def read_weights(folder: Path, safe: str, pickled: str) -> dict[str, Tensor]:
    """The tensors of `safe`, or where that is absent of `pickled`.

    Raises:
        Mismatch: neither is there, or it is damaged or holds anything but tensors.
    """
    path = folder / pickled
    if (folder / safe).is_file() or not path.is_file():
        return read_tensors(folder / safe)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        advice = "Save it as safetensors where you trust its source."
        raise Mismatch(
            f"{path} was not opened.", [Problem(pickled, f"is no file of tensors alone: {first}")], advice
        ) from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise Mismatch(f"{path} cannot be used.", [Problem(pickled, "is no table of tensors")])
    return {str(name): tensor for name, tensor in found.items()}
