"""A batch as a pass over it reads it: everything that does not depend on what is learned, as tensors and sizes.

Two batches of one shape differ in the tensors' numbers alone, so a pass that was recorded over one of them can be launched
again over the other (`train/graphs.py`). Knows layouts; no model, no method. Shapes: N packed tokens, K asked positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tritune.models.layout import Layout
from tritune.models.varlen import Rows


@dataclass(frozen=True, slots=True)
class Prepared:
    """`tokens_N`: the batch's own. `asked_K`: packed positions whose logits are wanted. `labels_K`: what is learned there."""

    tokens_N: Tensor
    layout: Layout
    asked_K: Tensor
    labels_K: Tensor

    def shape(self) -> Hashable:
        """What two batches have to have in common."""
        layout = self.layout
        sizes = tuple((name, tuple(tensor.shape)) for name, tensor in self._tensors())
        return sizes, self._rows.longest, tuple(layout.rows_behind.items()), layout.n_filling

    def to(self, device: torch.device) -> Prepared:
        """The same in memory of its own there."""
        layout = self.layout
        moved: dict[str, Any] = {name: tensor.to(device, copy=True) for name, tensor in self._tensors()}
        rows = {name: moved.pop(name) for name in ("query_ends", "key_ends", "key_T") if name in moved}
        whole = {name: moved.pop(name) for name in ("tokens_N", "asked_K", "labels_K")}
        return Prepared(layout=replace(layout, **moved, rows=replace(self._rows, **rows)), **whole)

    def take(self, other: Prepared) -> None:
        """Another batch of this shape, in this one's memory."""
        for (_, mine), (_, its) in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(its)

    @property
    def _rows(self) -> Rows:
        assert self.layout.rows is not None, "only what one kernel attends to can be prepared"
        return self.layout.rows

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        rows, layout = self._rows, self.layout
        found = {
            "tokens_N": self.tokens_N,
            "asked_K": self.asked_K,
            "labels_K": self.labels_K,
            "positions_N": layout.positions_N,
            "source_N": layout.source_N,
            "query_ends": rows.query_ends,
            "key_ends": rows.key_ends,
            "key_T": rows.key_T,
        }
        yield from ((name, tensor) for name, tensor in found.items() if tensor is not None)
