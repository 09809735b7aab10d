"""What is held in memory, and what is rather computed again: weights once, and no copy for the backward of what costs next to
nothing to make from what is kept anyway.

Knows tensors and autograd; no method, and no module by name. `fast.py` says what may be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def hold_in_memory(model: nn.Module) -> None:
    """Give every weight memory of its own where it is a part of a mapped file. As long as one is, all pages of that file
    that were ever read stay with the process, those of weights that were copied since (joined ones) included."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What autograd keeps instead of a tensor."""

    make: Callable[[], Tensor]
    shape: torch.Size

    def made(self) -> Tensor:
        return self.make().view(self.shape)


class MadeAgain:
    """Tensors of a forward pass that their readers do not keep. Only the latest is known here: what reads it follows at once
    (a norm's output, a gated product), and an address means nothing once its memory is another's."""

    def __init__(self) -> None:
        self._latest: tuple[Tensor, int, Callable[[], Tensor]] | None = None

    def offer(self, made: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`made`, which `make` can give again bit for bit as long as the tensors in it are as they are now."""
        if torch.is_grad_enabled():
            self._latest = made.detach(), made._version, make
        return made

    @contextmanager
    def instead_of_kept(self) -> Iterator[None]:
        """Inside, what was offered is not kept for the backward, but made again there."""
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._kept, _unpacked):
                yield
        finally:
            self._latest = None

    def _kept(self, tensor: Tensor) -> Tensor | _Recipe:
        if self._latest is None:
            return tensor
        made, version, make = self._latest
        same = (
            tensor.data_ptr() == made.data_ptr()
            and tensor.numel() == made.numel()
            and tensor.dtype == made.dtype
            and tensor.is_contiguous()
            and made._version == version  # nobody wrote into it
        )
        return _Recipe(make, tensor.shape) if same else tensor


def _unpacked(kept: Tensor | _Recipe) -> Tensor:
    return kept.made() if isinstance(kept, _Recipe) else kept
