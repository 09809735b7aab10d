"""Which number format a base computes in: bf16 where this machine is really faster with it, else fp32. And which its files
are in.

Processor flags do not tell: some that list AVX512-BF16 run it at half the rate of fp32, so a product is timed.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from tritune.models.digests import read_header
from tritune.models.folder import weight_files

Dtype = Literal["float32", "bfloat16"]

#: bf16 costs precision, so it has to pay
WORTH = 1.2


def torch_dtype(name: Dtype) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def stored_dtype(folder: Path) -> torch.dtype:
    """The narrowest format that holds every weight of a folder as it is."""
    kinds = {stored.dtype for file in weight_files(folder) for stored in read_header(file).values()}
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}
    return narrow.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Narrow formats become fp32; fp64 (gradient checks) stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@cache
def preferred(device: str = "cpu") -> Dtype:
    """The faster of the two formats for matrix products on this device; measured once per process (about 0.1 s on a CPU)."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if _seconds(torch.float32) > WORTH * _seconds(torch.bfloat16) else "float32"


def _seconds(dtype: torch.dtype) -> float:
    """Best of several timings, in seconds: lower is faster."""
    a, b = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return min(times)
