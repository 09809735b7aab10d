"""Full fine-tuning: every weight of the base moves.

The base itself stays as it is: the delta owns a copy of all weights in fp32 (the master), and the forward pass sees it in
the base's own format. What is exported is what was computed with, so a bf16 base exports bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from tritune.methods.base import Budget, Delta, Method
from tritune.models.load import Base
from tritune.spec import MethodConfig, Scope, Strategy


class Full(MethodConfig):
    """Full fine-tuning has nothing to choose but the training itself."""


class FullDelta(Delta):
    """A copy of every base weight; gradients reach the fp32 master through the cast."""

    def __init__(self, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        for name, tensor in weights.items():
            self.put(name, tensor.detach().clone())

    def weights(self) -> Mapping[str, Tensor]:
        return {name: master.to(self.dtype) for name, master in self.trainable().items()}

    def export(self) -> dict[str, Tensor]:
        return {name: tensor.detach().contiguous() for name, tensor in self.weights().items()}


class FullMethod(Method[Full]):
    kind = "full"
    strategy = Strategy.FULL
    scope = Scope.BASE
    Config = Full
    summary = "every weight of the base moves"
    learning_rate = 3e-5
    variants: ClassVar = (Full(),)

    def budget(self, config: Full, base: Base) -> Budget:
        n = sum(p.numel() for p in base.parameters().values())
        return Budget(trained=n, stored=n, stored_bytes=n * base.dtype.itemsize)

    def init(self, config: Full, base: Base, rng: torch.Generator) -> Delta:
        return FullDelta(base.parameters(), base.dtype)

    def shapes(self, config: Full, base: Base) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in base.parameters().items()}

    def _load(self, config: Full, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return FullDelta({name: t.to(base.device) for name, t in tensors.items()}, base.dtype)

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        return delta.export()


METHOD = FullMethod()
