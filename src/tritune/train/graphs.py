"""Forward and backward of a step, recorded once per shape and then launched as one: CUDA graphs.

A small base spends most of a step launching kernels from Python, one by one. A recorded step is one launch, over the same
memory each time: a batch's numbers are put there first (`models/prepared.py`), and batches are filled up to few shapes
(`text/few_shapes.py`). A shape that comes once is never recorded. Knows deltas by what they declare trainable.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from tritune.methods.base import Delta
from tritune.models.base import Batch
from tritune.models.past import Virtual
from tritune.models.prepared import Prepared
from tritune.models.pretrained import Base
from tritune.text.few_shapes import learned, rounded, rounded_up

#: a loss, and the gradients of what is trained; None: it had no part in it
Found = tuple[Tensor, Sequence[Tensor | None]]
Work = Callable[[], Found]
#: gives what does the same work again, in the same memory
Record = Callable[[Work], Work]
#: shapes that are recorded at most: each holds its gradients
MOST = 32


def may_be_recorded(delta: Delta) -> bool:
    """Whether a step is one pass over the base's own weights. With weights of its own a delta has gradients as large as the
    base; and where texts depend on nothing that is learned, most of them is not computed at all."""
    with torch.no_grad():
        return not delta.weights() and not Virtual(delta.segments()).texts_stand(delta)


class Graphs:
    """The steps of one run. Its delta stays bound, its parameters where they are in memory."""

    def __init__(self, base: Base, delta: Delta, record: Record | None = None) -> None:
        self._base = base
        self._parameters = tuple(delta.trainable().values())
        self._record = record or on_gpu()
        self._steps: dict[Hashable, _Step] = {}

    def backward(self, batch: Batch, n_targets: int) -> float:
        """Add the gradients of the batch's part of a step that learns so many tokens; returns that part's loss."""
        loss, gradients = self._step(self._prepared(batch), 1 / n_targets).run()
        for p, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                _add(p, gradient)
        return float(loss)

    def _prepared(self, batch: Batch) -> Prepared:
        filled = rounded(batch)
        at_K, labels_K = learned(filled)
        if not self._base.loses_in_pieces(len(at_K)):  # there every label counts
            at_K, labels_K = rounded_up(at_K, labels_K)
        return self._base.prepared(filled, at_K, labels_K)

    def _step(self, prepared: Prepared, factor: float) -> _Step:
        """The step of this shape with this batch in its memory. The second time it is recorded; the first time it runs kernel
        by kernel, which also gets the libraries ready."""
        shape = prepared.shape()
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = _Step(self._base, self._parameters, prepared.to(self._base.device))
        elif not step.recorded and self.recorded < MOST:
            step.run, step.recorded = self._record(step.run), True
        step.take(prepared, factor)
        return step

    @property
    def recorded(self) -> int:
        """Shapes that are launched as one."""
        return sum(step.recorded for step in self._steps.values())


def _add(p: nn.Parameter, gradient: Tensor) -> None:
    """To what is there, in memory of its own: a recorded step's is written anew. It lies as the parameter does, since the
    optimizer goes through both without looking at strides."""
    if p.grad is None:
        p.grad = torch.empty_like(p, requires_grad=False).copy_(gradient)
    else:
        p.grad.add_(gradient)


class _Step:
    """Batches of one shape, one after the other in the same memory."""

    def __init__(self, base: Base, parameters: Sequence[nn.Parameter], inputs: Prepared) -> None:
        self._base, self._parameters, self._inputs = base, parameters, inputs
        self._factor = torch.ones((), device=base.device)
        self.run: Work = self._work
        self.recorded = False

    def take(self, prepared: Prepared, factor: float) -> None:
        """What `run` reads: a batch, and what its loss is multiplied by."""
        self._inputs.take(prepared)
        self._factor.fill_(factor)

    def _work(self) -> Found:
        loss = self._base.loss_of(self._inputs) * self._factor
        return loss.detach(), torch.autograd.grad(loss, self._parameters, allow_unused=True)


def on_gpu() -> Record:
    """Records what a GPU is told to do. All recorded steps share their memory but for what they are given and give, since
    one is over when the next begins."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Work) -> Work:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # what a library does at first use on a stream must not be recorded
            work()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            found = work()

        def launched() -> Found:
            graph.replay()
            return found

        return launched

    return record
