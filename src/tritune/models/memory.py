"""What is held in memory, and what is rather computed again: weights once, and no copy for the backward of what costs next to
nothing to make from what is kept anyway.

Knows tensors and autograd; no method, and no module by name. `fast.py` says what may be made again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: bytes that are kept for a backward although they could be made again, which would cost 4 % of a step
KEPT = 1 << 27


def hold_in_memory(model: nn.Module) -> None:
    """Give every weight memory of its own where it is a part of a mapped file. As long as one is, all pages of that file
    that were ever read stay with the process, those of weights that were copied since (joined ones) included."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not parameter.untyped_storage().resizable():
            parameter.data = parameter.data.clone()


@contextmanager
def aside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Weights that nothing reads for a while lie in a mapped file as long as the context is open: they can be read, but take
    memory only then. Left where they are: weights on a GPU, and all where the disk has no room to spare."""
    weights = [p for p in parameters if p.device.type == "cpu" and p.numel()]
    weights.sort(key=lambda p: -p.itemsize)  # so that each lies where its format may
    size = sum(p.nbytes for p in weights)
    with tempfile.TemporaryDirectory(prefix="tritune-weights-") as folder:
        if size > shutil.disk_usage(folder).free // 2:
            yield
            return
        path = Path(folder) / "weights"
        with path.open("wb") as file:
            for p in weights:
                file.write(p.detach().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # a buffer
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        parts = torch.split(mapped, [p.nbytes for p in weights])
        for p, part in zip(weights, parts, strict=True):
            p.data = part.view(p.dtype).view(p.shape)
        del mapped, parts
        try:
            yield
        finally:
            with path.open(
                "rb"
            ) as file:  # read, not copied: pages of the map would be held beside what is made of them
                for p in weights:
                    read = torch.frombuffer(bytearray(file.read(p.nbytes)), dtype=p.dtype)
                    p.data = read.view(p.shape).clone()


def is_much(config: Any, n: int, dtype: torch.dtype) -> bool:
    """Whether what norms and gated layers make of n tokens is more than is kept where it could be made again."""
    per_layer = 2 * int(config.hidden_size) + int(getattr(config, "intermediate_size", None) or 0)
    return n * int(config.num_hidden_layers) * per_layer * dtype.itemsize > KEPT


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
        self._wanted = False

    def offer(self, made: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`made`, which `make` can give again bit for bit as long as the tensors in it are as they are now."""
        if self._wanted and torch.is_grad_enabled():
            self._latest = made.detach(), made._version, make
        return made

    @contextmanager
    def instead_of_kept(self, wanted: bool = True) -> Iterator[None]:
        """Inside, what is offered is not kept for the backward, but made again there; unless that is not wanted."""
        if not wanted:  # every saved tensor would pass through here for nothing
            yield
            return
        self._wanted = True
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._kept, _unpacked):
                yield
        finally:
            self._wanted, self._latest = False, None

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
