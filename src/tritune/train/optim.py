"""The optimizer and its rate over time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from tritune.models.halves import halve, make_whole
from tritune.run import Training

#: what is kept of every parameter, by the names that torch gives it
MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS, EPS = (0.9, 0.999), 1e-8
#: numbers of a piece of a parameter in halves: what it is made of stays in a processor's cache; on a GPU, one launch for much
PIECE, PIECE_ON_GPU = 1 << 19, 1 << 26


def rate(training: Training, peak: float, step: int, total: int) -> float:
    """Learning rate of optimizer step `step` (from 1) of `total`: linear warm-up, then decay to zero after the last."""
    warm = math.ceil(training.warmup * total)
    if step <= warm:
        return peak * step / warm
    left = (total - step + 1) / (total - warm + 1)
    if training.schedule == "linear":
        return peak * left
    if training.schedule == "cosine":
        return peak * 0.5 * (1 - math.cos(math.pi * left))
    return peak


def clipping(norm: float, most: float | None) -> float:
    """What gradients of this norm are multiplied by so that it is at most so much; None: it may be any."""
    return 1.0 if most is None else min(1.0, most / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) by torch's fused kernel, which shrinks gradients in the same pass.

    Args:
        parameters: what is trained, by name.
        weight_decay: decoupled from the gradient.
        factors: what the rate of a parameter is multiplied by, by name; 1 where nothing is said.
        rests: of parameters that are bf16, the rest of their fp32 masters (`models/halves.py`), by name. They go through the
            kernel a piece at a time, as fp32 numbers that exist nowhere else. Their moments are fp32.
        summed: a step's gradients come in several parts. Then they are added up in fp32 whatever the parameters are.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        weight_decay: float = 0.0,
        factors: Mapping[str, float] = MappingProxyType({}),
        rests: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        summed: bool = False,
    ) -> None:
        self._parameters, self._rests, self._decay = dict(parameters), dict(rests), weight_decay
        self._factors = {name: factors.get(name, 1.0) for name in parameters}
        self._moments = {kind: _side_by_side(self._parameters) for kind in MOMENTS}
        self._steps = {name: torch.zeros((), device=p.device) for name, p in parameters.items()}
        for name in rests if summed else ():
            parameters[name].grad_dtype = torch.float32

    def norm(self) -> float:
        """Of all gradients together."""
        norms = [_norms(p.grad) for p in self._parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(norms))

    def take(self, rate: float, shrink: float = 1.0) -> None:
        """One step at this rate, by gradients `shrink` (at most 1) times what they are. These are gone afterwards."""
        moving = [name for name, p in self._parameters.items() if p.grad is not None]
        for factor in dict.fromkeys(self._factors[name] for name in moving):
            alike = [name for name in moving if self._factors[name] == factor]
            self._step([name for name in alike if name not in self._rests], rate * factor, shrink)
            for name in (name for name in alike if name in self._rests):
                self._step_in_pieces(name, rate * factor, shrink)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for p in self._parameters.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on; the tensors themselves."""
        steps = {f"{name}/step": step for name, step in self._steps.items()}
        return steps | {f"{name}/{kind}": t for kind, of in self._moments.items() for name, t in of.items()}

    def restore(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Go on from a state, item by item."""
        for key, tensor in state:
            name, _, kind = key.rpartition("/")
            (self._steps if kind == "step" else self._moments[kind])[name].copy_(tensor)

    def _step(self, names: Sequence[str], rate: float, shrink: float) -> None:
        parameters = [self._parameters[name] for name in names]
        gradients = [p.grad for p in parameters if p.grad is not None]
        moments = [[of[name] for name in names] for of in self._moments.values()]
        steps = [self._steps[name] for name in names]
        self._update([p.data for p in parameters], gradients, moments, steps, rate, shrink)

    @torch.no_grad()
    def _step_in_pieces(self, name: str, rate: float, shrink: float) -> None:
        p, step = self._parameters[name], self._steps[name]
        assert p.grad is not None
        size = min(p.numel(), PIECE_ON_GPU if p.is_cuda else PIECE)
        wide, gradient = (torch.empty(size, dtype=torch.float32, device=p.device) for _ in range(2))
        moments = (of[name] for of in self._moments.values())
        for near, rest, found, *of_piece in _pieces(size, p.data, self._rests[name], p.grad, *moments):
            n = len(near)
            master = make_whole(near, rest, wide[:n])
            gradient[:n].copy_(found)
            counted = step.clone()  # every call counts one step more
            self._update([master], [gradient[:n]], [[t] for t in of_piece], [counted], rate, shrink)
            halve(master, near, rest)
        step += 1

    def _update(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        moments: Sequence[list[Tensor]],
        steps: list[Tensor],
        rate: float,
        shrink: float,
    ) -> None:
        exp_avgs, exp_avg_sqs = moments
        adamw(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            grad_scale=torch.tensor(1 / shrink) if shrink < 1 else None,  # the kernel divides by it
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=self._decay,
            eps=EPS,
            maximize=False,
        )


def _side_by_side(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Zeros for every parameter, made before anything else. Made at the first step, between activations, the holes that they
    left there took hundreds of megabytes with full fine-tuning."""
    kinds: dict[tuple[torch.dtype, torch.device], dict[str, nn.Parameter]] = {}
    for name, p in parameters.items():
        kinds.setdefault((torch.promote_types(p.dtype, torch.float32), p.device), {})[name] = p
    found: dict[str, Tensor] = {}
    for (dtype, device), alike in kinds.items():
        sizes = [p.numel() for p in alike.values()]
        parts = torch.zeros(sum(sizes), dtype=dtype, device=device).split(sizes)  # type: ignore[no-untyped-call]
        found |= {name: part.view(p.shape) for (name, p), part in zip(alike.items(), parts, strict=True)}
    return found


def _norms(gradient: Tensor) -> Tensor:
    """One norm, or several whose norm it is: that of a bf16 tensor is rounded to bf16, and many errors even out."""
    rows = None if gradient.dtype is torch.float32 or gradient.dim() < 2 else -1
    norms: Tensor = torch.linalg.vector_norm(gradient, dim=rows)
    return norms.float()


def _pieces(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same part of each, as vectors."""
    return zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)
