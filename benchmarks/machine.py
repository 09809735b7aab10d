"""What the machine can do and what runs on it: the matrix rate, the processor, versions. Knows torch; no model."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "trl", "adapters", "accelerate", "lm_eval")
SIDE = 1024  # two thousand million operations: long against its start, short against a training step
SIDE_GPU = 8192
REPEATS = 4


def matrix_rate(dtype: torch.dtype, device: str, side: int) -> float:
    """Operations per second of a square product, the median of a few."""
    a = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        a @ a
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / statistics.median(seconds[1:])


def matrix_rates(device: str = "cpu") -> dict[str, float]:
    """Of both formats that a base may compute in; of one that is far behind, by a smaller product that costs no seconds."""
    side = SIDE_GPU if device.startswith("cuda") else SIDE
    rough = {name: matrix_rate(getattr(torch, name), device, side // 4) for name in ("float32", "bfloat16")}
    hopeless = max(rough.values()) / 4
    return {
        name: rate if rate < hopeless else matrix_rate(getattr(torch, name), device, side)
        for name, rate in rough.items()
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> dict[str, object]:
    """Name, cores and the matrix instructions it lists."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [f for f in fields.get("flags", "").split() if f.startswith(("avx512", "amx", "avx2", "avx_"))]
    return {
        "name": fields.get("model name", platform.processor()),
        "family": f"{fields.get('cpu family', '')}/{fields.get('model', '')}/{fields.get('stepping', '')}",
        "cores": os.cpu_count(),
        "flags": flags,
    }


def commit() -> str:
    """The commit that is measured, with "+" if the tree differs from it; empty outside a clone."""
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../src"], cwd=here, check=False)
    return head.stdout.strip() + ("+" if head.stdout and changed.returncode else "")
