"""What `torch.compile` would bring to the element-wise regions of a layer, what it costs, and when it has paid for itself.

    python -m benchmarks.compiled [--tokens 1024] [--turns 15]

Each region forward and backward at SmolLM2-135M's sizes: the package's written-out kernel, the plain expression, and that
expression compiled, in turn (A B C, C B A, ...). Needs a C++ compiler. One JSON line per region, then one for all layers:
seconds a step would save, seconds that compiling took, and after how many steps that is even.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.records import Records
from tritune.models import kernels

LAYERS, WIDTH, INNER, HEADS, HEAD = 30, 576, 1536, 12, 64  # queries and keys are rotated
EPS = 1e-5

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Region:
    """`ours` and `plain` compute the same of `inputs`, which need gradients but for the first `constants`."""

    name: str
    per_layer: int
    ours: Function
    plain: Function
    inputs: tuple[Tensor, ...]


def plain_norm(x_ND: Tensor, weight_D: Tensor) -> Tensor:
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + EPS) * weight_D


def plain_rotation(x_NHd: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    x_HNd = x_NHd.transpose(0, 1)
    first, second = x_HNd.chunk(2, -1)
    return x_HNd * cos_Nd + torch.cat([-second, first], -1) * sin_Nd


def plain_gate(gate_up_N2F: Tensor) -> Tensor:
    gate_NF, up_NF = gate_up_N2F.chunk(2, -1)
    return F.silu(gate_NF) * up_NF


def regions(tokens: int) -> list[Region]:
    generator = torch.Generator().manual_seed(0)
    cos_sin = [torch.randn(tokens, HEAD // 2, generator=generator).repeat(1, 2) for _ in range(2)]

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    return [
        Region(
            "norm",
            2,
            lambda x, w: kernels.rms_norm(x, w, EPS),
            plain_norm,
            (drawn(tokens, WIDTH), torch.ones(WIDTH)),
        ),
        Region("rotation", 1, kernels.rotate, plain_rotation, (drawn(tokens, HEADS, HEAD), *cos_sin)),
        Region("gate", 1, kernels.swiglu, plain_gate, (drawn(tokens, 2 * INNER),)),
    ]


def seconds(function: Function, inputs: tuple[Tensor, ...], gradient: Tensor) -> float:
    """Of one forward and backward."""
    inputs[0].grad = None
    start = time.perf_counter()
    torch.autograd.backward(function(*inputs), gradient)
    return time.perf_counter() - start


def measure(region: Region, turns: int) -> dict[str, object]:
    compiled = torch.compile(region.plain)
    sides = {"ours": region.ours, "plain": region.plain, "compiled": compiled}
    gradient = torch.randn_like(region.plain(*region.inputs))
    first, gradients = {}, {}
    for name, function in sides.items():
        first[name] = seconds(function, region.inputs, gradient)
        gradients[name] = region.inputs[0].grad
    for name in ("plain", "compiled"):
        torch.testing.assert_close(gradients[name], gradients["ours"], rtol=1e-4, atol=1e-5)
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name in sides if turn % 2 else reversed(sides):
            taken[name].append(seconds(sides[name], region.inputs, gradient))
    medians = {name: median(times) for name, times in taken.items()}
    return {
        "region": region.name,
        "per_step": region.per_layer * LAYERS,
        "ms": {name: round(1e3 * value, 3) for name, value in medians.items()},
        "compile_seconds": round(first["compiled"] - medians["compiled"], 1),
        "saved_per_step": round((medians["ours"] - medians["compiled"]) * region.per_layer * LAYERS, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, help="file of results (benchmarks/results/compiled.jsonl)")
    options = parser.parse_args()
    records = Records("compiled", options.out)
    found = []
    for region in regions(options.tokens):
        found.append(measure(region, options.turns))
        records.add(found[-1])
    saved, cost = (sum(float(str(one[key])) for one in found) for key in ("saved_per_step", "compile_seconds"))
    records.add(
        {
            "region": "all",
            "tokens": options.tokens,
            "threads": torch.get_num_threads(),
            "saved_per_step": round(saved, 4),
            "compile_seconds": round(cost, 1),
            "even_after_steps": round(cost / saved) if saved > 0 else None,
        }
    )


if __name__ == "__main__":
    main()
