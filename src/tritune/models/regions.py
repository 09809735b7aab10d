"""Element-wise regions as one kernel each, by torch.compile: norms, gated activations, on a GPU the loss of logits.

`kernels.py` and `head.py` compute the same in several passes; those are the slow twins. Compiling takes a while, so nothing
is compiled until somebody says that it pays (`use`), and for a processor only where there is a C++ compiler. The number of
tokens becomes a symbol when it is seen to change; widths stay numbers, or the kernels would compute indexes instead of
results.
Shapes: N packed tokens, D model width, F width of a gated layer, K scored positions, V vocabulary.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class _Use:
    on = False
    on_processor = False
    made: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}


def use(on: bool) -> None:
    """From now on, regions are compiled when they are first met; or no longer used."""
    _Use.on = on
    _Use.on_processor = on and compiler() is not None


def in_use(x: Tensor) -> bool:
    return _Use.on and (x.is_cuda or _Use.on_processor)


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call for a processor."""
    return shutil.which(os.environ.get("CXX") or "g++")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """That region as one kernel. It knows nothing of a graph: whoever calls it writes the backward."""
    if function not in _Use.made:
        kernel = torch.compile(function)

        def called(*args: Any) -> Any:
            return kernel(*(x.detach() if isinstance(x, Tensor) else x for x in args))  # type: ignore[call-arg,arg-type]

        _Use.made[function] = called
    return cast("Callable[P, R]", _Use.made[function])


def normed(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse).to(x.dtype) * weight_D


def norm_slope(g: Tensor, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Gradient of x. The sum over a row is taken anew: x is read anyway."""
    wide, slope = x.float(), (g * weight_D).float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    mean = (slope * wide).mean(-1, keepdim=True) * inverse.pow(3)
    return (slope * inverse - wide * mean).to(x.dtype)


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    gate = gate_NF.float()
    return (gate * torch.sigmoid(gate)).to(gate_NF.dtype) * up_NF


def write_slopes(out_gate_NF: Tensor, out_up_NF: Tensor, g_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> None:
    """Gradients of gate and up, each into its place: on a processor, where a GPU's kernel would read all of it twice."""
    gate, g = gate_NF.float(), g_NF.float()
    opened = torch.sigmoid(gate)
    out_gate_NF.copy_(g * up_NF * opened * (1 + gate * (1 - opened)))
    out_up_NF.copy_(g * gate * opened)


def write_gate_slope(out_NF: Tensor, g_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> None:
    """Gradient of gate, into its place beside that of up."""
    gate = gate_NF.float()
    opened = torch.sigmoid(gate)
    out_NF.copy_(g_NF.float() * up_NF * opened * (1 + gate * (1 - opened)))


def write_up_slope(out_NF: Tensor, g_NF: Tensor, gate_NF: Tensor) -> None:
    """Gradient of up."""
    gate = gate_NF.float()
    out_NF.copy_(g_NF.float() * gate * torch.sigmoid(gate))


def loss_and_slope(z_KV: Tensor, labels_K1: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position (K, 1), and its gradient of the logits (K, V) in the format of `like`."""
    whole_K1 = torch.logsumexp(z_KV, -1, keepdim=True)
    hit_KV = torch.arange(z_KV.shape[1], device=z_KV.device) == labels_K1
    return whole_K1 - z_KV.gather(1, labels_K1), (torch.exp(z_KV - whole_K1) - hit_KV.float()).to(like.dtype)
