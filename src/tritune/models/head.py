"""The head: logits in fp32 whatever the base computes in, and losses without all logits at once.

The head's module gets the forward in here; the model around it stays transformers' own. Knows no method and no task.
Shapes: K scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tritune.models import regions, round_numbers
from tritune.models.base import IGNORE
from tritune.models.dtype import at_least_float32
from tritune.models.library import PreTrainedModel

#: models whose logits are what the head gives, with nothing behind it: the loss may be taken inside the head
PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
#: bytes of logits that are held at once when only their loss is wanted
CHUNK = 1 << 28
#: rows of a bf16 weight that are widened at once
WIDENED = 4096


def head_of(model: PreTrainedModel) -> Head:
    """A model's head; two bases on one model share it."""
    head = model.get_output_embeddings().__dict__.get("forward")  # type: ignore[no-untyped-call]
    return head if isinstance(head, Head) else Head(model)


class Head:
    """The forward of a model's head.

    bf16 logits around 30 are 0.125 apart, and answers would tie: a bf16 head's logits are fp32.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.module: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.plain = type(model).__name__ in PLAIN and type(self.module) is nn.Linear
        self._logits = self.module.forward
        self._labels_K: Tensor | None = None
        self.module.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        weight_VD: Tensor = self.module.weight
        bias_V: Tensor | None = self.module.bias
        if self._labels_K is None and weight_VD.dtype is not torch.bfloat16:
            logits: Tensor = self._logits(x)
            return logits
        x_KD = x.flatten(0, -2)
        if self._labels_K is not None:
            given = (x_KD, weight_VD, bias_V, self._labels_K, CHUNK)
            loss: Tensor = SummedLoss.apply(*given)  # type: ignore[no-untyped-call]
            return loss.view(1, 1, 1)
        y_KV: Tensor = _Wide.apply(x_KD, weight_VD)  # type: ignore[no-untyped-call]
        y_KV = y_KV if bias_V is None else y_KV + bias_V
        return y_KV.view(*x.shape[:-1], len(weight_VD))

    def pays(self, n: int) -> bool:
        """Whether the logits of n positions are better never held together."""
        return self.plain and n * self.module.out_features * 4 > CHUNK

    @contextmanager
    def answering_with_loss(self, labels_K: Tensor) -> Iterator[None]:
        """Inside, the head gives the sum of the positions' cross-entropies (1, 1, 1) instead of logits."""
        self._labels_K = labels_K
        try:
            yield
        finally:
            self._labels_K = None


def product(x_KD: Tensor, weight_VD: Tensor) -> Tensor:
    """x Wᵀ (K, V), at least fp32 and summed in fp32, which is exact for numbers of 16 bits.

    A GPU takes narrow numbers and gives wide ones. A processor has no product for that: a part of the weight after the other
    is widened into the same memory, and multiplied in bf16 all the same where there is a unit for it: nothing is rounded.
    """
    if x_KD.is_cuda and x_KD.dtype is torch.bfloat16:
        return torch.mm(x_KD, weight_VD.T, out_dtype=torch.float32)
    if weight_VD.dtype is not torch.bfloat16:
        return at_least_float32(x_KD) @ at_least_float32(weight_VD).T
    K, (V, D) = len(x_KD), weight_VD.shape
    wide_KD = round_numbers.filled(x_KD).float()
    z_KV = wide_KD.new_empty(len(wide_KD), V)
    wide_vD = wide_KD.new_empty(min(V, WIDENED), D)
    with _multiplying_in_bf16():
        for start in range(0, V, WIDENED):
            part_vD = weight_VD[start : start + WIDENED]
            torch.mm(wide_KD, wide_vD[: len(part_vD)].copy_(part_vD).T, out=z_KV[:, start : start + WIDENED])
    return z_KV[:K]


@contextmanager
def _multiplying_in_bf16() -> Iterator[None]:
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch's stubs lack it
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


class _Wide(torch.autograd.Function):
    """`product`; what comes back is rounded to the width of x, as the gradient of x is anyway."""

    @staticmethod
    def forward(ctx: Any, x_KD: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x_KD, weight_VD)
        return product(x_KD, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_KV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_KD, weight_VD = ctx.saved_tensors
        g = g_KV.to(x_KD.dtype)
        return (
            (round_numbers.filled(g) @ weight_VD)[: len(g)] if ctx.needs_input_grad[0] else None,
            g.T @ x_KD if ctx.needs_input_grad[1] else None,
        )


class SummedLoss(torch.autograd.Function):
    """Sum of cross-entropies of x Wᵀ + b, in pieces of at most `limit` bytes of logits. Labels that are IGNORE count nothing.

    The gradients are made on the way forward, while a piece's logits are there; they only wait for a factor. So a backward
    costs nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_KD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        labels_K: Tensor,
        limit: int,
    ) -> Tensor:
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        V = weight_VD.shape[0]
        rows = max(1, limit // (4 * V))
        total = x_KD.new_zeros((), dtype=torch.promote_types(x_KD.dtype, torch.float32))
        grad_x = torch.empty_like(x_KD) if wants_x else None
        grad_weight = torch.zeros_like(weight_VD, dtype=total.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=total.dtype) if wants_bias and bias_V is not None else None
        for start in range(0, len(x_KD), rows):
            x_kD, labels_k1 = x_KD[start : start + rows], labels_K[start : start + rows, None]
            counts_k1 = (labels_k1 != IGNORE).to(x_KD.dtype)
            labels_k1 = labels_k1.clamp(min=0)
            z_kV = product(x_kD, weight_VD)
            if bias_V is not None:
                z_kV += bias_V
            if z_kV.is_cuda and regions.in_use(z_kV):
                loss_k1, slope_kV = regions.compiled(regions.loss_and_slope)(z_kV, labels_k1, x_KD)
            else:
                loss_k1, slope_kV = _loss_and_slope(z_kV, labels_k1, x_KD)
            total += (loss_k1 * counts_k1).sum()
            if grad_bias is not None:
                grad_bias += (slope_kV * counts_k1).sum(0, dtype=total.dtype)
            if grad_x is not None:
                grad_x[start : start + rows] = (round_numbers.filled(slope_kV) @ weight_VD)[: len(x_kD)] * counts_k1
            if grad_weight is not None:
                grad_weight += slope_kV.T @ (x_kD * counts_k1)  # narrower than the slopes
        ctx.grads = (
            grad_x,
            None if grad_weight is None else grad_weight.to(weight_VD.dtype),
            None if grad_bias is None or bias_V is None else grad_bias.to(bias_V.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # used up: nothing holds them beside what reads them now
        return (*(None if grad is None else grad.mul_(g) for grad in grads), None, None)


def _loss_and_slope(z_KV: Tensor, labels_K1: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Slow twin of the region; the logits are used up."""
    largest_K1, at_K1 = z_KV.max(-1, keepdim=True)
    right_K1 = z_KV.gather(1, labels_K1)
    slope_KV = torch.softmax(z_KV, -1, out=z_KV)  # several times faster than logsumexp, which is in there, too
    loss_K1 = largest_K1 - slope_KV.gather(1, at_K1).log_() - right_K1
    slope_KV.scatter_add_(1, labels_K1, torch.full_like(right_K1, -1.0))
    return loss_K1, slope_KV.to(like.dtype)
