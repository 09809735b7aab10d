"""What is wrong with foreign tensors, told by their own names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tritune.errors import Problem


def tensor_problems(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    """Missing, surplus, misshapen and non-finite tensors, by their names there."""
    found = [Problem(name, "missing") for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            found.append(Problem(name, "no place of this base and this config has it"))
        elif tuple(tensor.shape) != shapes[name]:
            found.append(Problem(name, f"has shape {tuple(tensor.shape)}, expected {shapes[name]}"))
        elif not tensor.is_floating_point():
            found.append(Problem(name, f"holds {tensor.dtype}, expected numbers of 16 or 32 bits"))
        elif not bool(tensor.isfinite().all()):
            found.append(Problem(name, "holds values that are not finite"))
    return found
