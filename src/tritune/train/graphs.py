"""Forward and backward of a pass, recorded once per shape and then launched as one: CUDA graphs.

A small base spends most of a step launching kernels from Python, one by one. A recorded pass is one launch, over the same
memory each time: a batch's numbers are put there first (`models/prepared.py`), and batches are filled up to few shapes
(`text/few_shapes.py`). A shape that comes once is never recorded. Knows deltas by what they declare trainable.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from tritune.methods.base import Delta
from tritune.models.base import Batch
from tritune.models.past import Virtual
from tritune.models.prepared import Prepared
from tritune.models.pretrained import Base
from tritune.text.few_shapes import learned, rounded

#: adds gradients to sums that it knows, and gives a loss
Work = Callable[[], Tensor]
#: gives what does the same work again, in the same memory
Record = Callable[[Work], Work]
#: shapes that are recorded at most
MOST = 32


def may_be_recorded(delta: Delta) -> bool:
    """Whether a pass goes over the base's own weights and all tokens of its rows. With weights of its own a delta has
    gradients as large as the base; and where texts depend on nothing that is learned, most tokens are not computed at all."""
    with torch.no_grad():
        return not delta.weights() and not Virtual(delta.segments()).texts_stand(delta)


class Graphs:
    """The passes of one run. Its delta stays bound, its parameters stay where they are in memory.

    Gradients of all shapes add up in the same tensors, which lie as the parameters do: the optimizer goes through both
    without looking at strides.
    """

    def __init__(self, base: Base, delta: Delta, record: Record | None = None) -> None:
        self._base = base
        self._parameters = tuple(delta.trainable().values())
        self._sums = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]
        with torch.no_grad():
            self._virtual = Virtual(delta.segments())
        self._record = record or on_gpu(base.device)
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Pass] = {}

    @property
    def recorded(self) -> int:
        """Shapes that are launched as one."""
        return len(self._recorded)

    def backward(self, batch: Batch, n_targets: int) -> float:
        """Add the gradients of a batch's part of a step that learns so many tokens; returns that part's loss."""
        filled = rounded(batch)
        prepared = self._base.prepared(filled, *learned(filled), self._virtual)
        one = self._pass(prepared)
        if all(p.grad is None for p in self._parameters):
            torch._foreach_zero_(self._sums)
        loss = one(prepared, 1 / n_targets)
        for i in one.reached:
            self._parameters[i].grad = self._sums[i]
        return float(loss)

    def _pass(self, prepared: Prepared) -> _Pass:
        """The first of a shape runs kernel by kernel, which also gets the libraries ready; with the second it is recorded."""
        shape = prepared.shape()
        if shape in self._recorded:
            return self._recorded[shape]
        one = _Pass(self, prepared)
        if shape in self._seen and self.recorded < MOST:
            one.run = self._record(one.run)
            self._recorded[shape] = one
        self._seen.add(shape)
        return one

    def add_gradients(self, inputs: Prepared, factor: Tensor) -> tuple[Tensor, list[int]]:
        """The work itself. Returns the loss, and which parameters it depends on."""
        loss = self._base.loss_of(inputs) * factor
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        reached = {i: gradient for i, gradient in enumerate(found) if gradient is not None}
        torch._foreach_add_([self._sums[i] for i in reached], list(reached.values()))
        return loss.detach(), list(reached)


class _Pass:
    """Batches of one shape, one after the other in the same memory. While it is recorded, losses count nothing."""

    def __init__(self, graphs: Graphs, first: Prepared) -> None:
        self._inputs = first.to(graphs._base.device)
        self._factor = torch.zeros((), device=graphs._base.device)
        self._graphs = graphs
        self.run: Work = self._work
        self.reached: list[int] = []

    def __call__(self, prepared: Prepared, factor: float) -> Tensor:
        self._inputs.take(prepared)
        self._factor.fill_(factor)
        return self.run()

    def _work(self) -> Tensor:
        loss, self.reached = self._graphs.add_gradients(self._inputs, self._factor)
        return loss


def on_gpu(device: torch.device) -> Record:
    """Records what a GPU is told to do. All that is recorded shares its memory but for what it is given and gives, since one
    pass is over when the next begins; and one stream, for which libraries keep memory of their own."""
    with torch.cuda.device(device):
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(work: Work) -> Work:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what a library does at first use on a stream must not be recorded
                work()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                loss = work()

        def launched() -> Tensor:
            graph.replay()
            return loss

        return launched

    return record
