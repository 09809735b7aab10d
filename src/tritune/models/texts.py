"""Keys and values of texts in the bare base, kept from pass to pass: in memory up to a bound, then in a file.

What a text is to the base does not change while virtual tokens behind it are trained. Texts are named by their token ids and
computed in groups that depend on the whole set of texts alone, so a run that goes on after a stop sees the very same numbers.
Knows no model: how keys and values are computed is passed in. Shapes: n layers, M tokens, K key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tritune.models.base import Batch, Span
from tritune.models.pieces import text_batch
from tritune.text.pack import shared_beginning

#: tokens that are computed at once
GROUP_TOKENS = 2048

Ids = tuple[int, ...]


class TextCache:
    """Keys and values of known texts; those of others are computed whenever they are asked for.

    Args:
        compute: keys and values (n, 2, M, K, d) of a batch's texts.
        texts: what will be asked for again, each from its first token on.
        shape: n, K, d.
        dtype: the format that `compute` gives.
        folder: where the file may be; it is made when it is needed.
        memory, disk: bytes that may be held in memory, and in the file. Texts beyond both are as if unknown.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Tensor],
        texts: Sequence[Ids],
        *,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        folder: Path,
        memory: int,
        disk: int,
    ) -> None:
        self._compute = compute
        self._texts = list(dict.fromkeys(texts))
        self._numbers = 2 * prod(shape)  # of one token
        self._dtype = dtype
        self._folder = folder
        self._memory, self._disk = memory, disk

    def keys_values(self, batch: Batch) -> Tensor:
        """What `compute` gives for this batch, up to rounding."""
        texts = text_batch(batch)
        tokens, spans = texts.tokens_N.tolist(), texts.spans
        parts: dict[int, Tensor] = {}
        unknown: set[int] = set()
        for i, span in enumerate(spans):
            if span.text is None:
                continue
            line = [(j, spans[j]) for j in (*span.parents, i)]
            row = self._rows.get(tuple(t for _, s in line for t in tokens[s.start : s.start + s.length]))
            at = 0
            for j, piece in line:
                if row is None:
                    unknown.add(j)
                elif j not in parts:
                    parts[j] = self._part(row, at, at + piece.length)
                at += piece.length
        if unknown:
            parts = self._computed(texts, sorted(unknown)) | parts
        return torch.cat([parts[i] for i in range(len(spans))], 2)

    def _computed(self, texts: Batch, indexes: Sequence[int]) -> dict[int, Tensor]:
        """Keys and values of some spans; what they see is among them."""
        found = {old: new for new, old in enumerate(indexes)}
        builder = _Rows()
        for i in indexes:
            span = texts.spans[i]
            ids = texts.tokens_N[span.start : span.start + span.length].tolist()
            builder.add(ids, tuple(found[p] for p in span.parents), ends=span.text is not None)
        layers = self._compute(builder.batch())
        parts = torch.split(layers, [texts.spans[i].length for i in indexes], 2)
        return dict(zip(indexes, parts, strict=True))

    def _part(self, row: _Row, begin: int, end: int) -> Tensor:
        """Keys and values of a known text's tokens from `begin` to `end`."""
        n, layers = self._n_common, self._layers(self._groups[row.group])
        own = layers[:, :, row.start + max(begin, n) - n : row.start + max(end, n) - n]
        return own if begin >= n else torch.cat([self._common[:, :, begin : min(end, n)], own], 2)

    def _layers(self, group: _Group) -> Tensor:
        """Keys and values of all texts of a group, without what all texts begin with."""
        if group.layers is None:
            builder = _Rows()
            parents = (builder.add(group.texts[0][: self._n_common], (), ends=False),) if self._n_common else ()
            for text in group.texts:
                builder.add(text[self._n_common :], parents, ends=True)
            computed = self._compute(builder.batch())[:, :, self._n_common :]
            if group.file_start is None:
                group.layers = computed.contiguous()
            else:
                room = self._file[group.file_start : group.file_start + computed.numel()]
                group.layers = room.view(computed.shape).copy_(computed)
        return group.layers

    # --- what goes where: depends on the texts and the bounds alone ---

    @cached_property
    def _n_common(self) -> int:
        """How many first tokens all texts have in common; they are held once."""
        return shared_beginning(self._texts) if self._texts else 0

    @cached_property
    def _common(self) -> Tensor:
        builder = _Rows()
        builder.add(self._texts[0][: self._n_common], (), ends=True)
        return self._compute(builder.batch())

    @cached_property
    def _groups(self) -> list[_Group]:
        groups: list[_Group] = []
        in_memory = in_file = 0
        for texts in self._together():
            numbers = self._numbers * sum(len(text) - self._n_common for text in texts)
            size = numbers * self._dtype.itemsize
            if in_memory + size <= self._memory:
                groups.append(_Group(texts))
                in_memory += size
            elif in_file + size <= self._disk:
                groups.append(_Group(texts, in_file // self._dtype.itemsize))
                in_file += size
        return groups

    def _together(self) -> list[list[Ids]]:
        """Texts of similar length, about `GROUP_TOKENS` tokens each time."""
        groups: list[list[Ids]] = []
        left = 0
        for text in sorted(self._texts, key=len):
            if left < len(text):
                groups.append([])
                left = GROUP_TOKENS
            groups[-1].append(text)
            left -= len(text) - self._n_common
        return groups

    @cached_property
    def _rows(self) -> dict[Ids, _Row]:
        rows = {}
        for index, group in enumerate(self._groups):
            start = 0
            for text in group.texts:
                rows[text] = _Row(index, start)
                start += len(text) - self._n_common
        return rows

    @cached_property
    def _file(self) -> Tensor:
        tokens = sum(len(t) - self._n_common for g in self._groups if g.file_start is not None for t in g.texts)
        path = str(self._folder / "texts")
        return torch.from_file(path, shared=True, size=self._numbers * tokens, dtype=self._dtype)


@dataclass(slots=True)
class _Group:
    """Texts that are computed together, when one of them is first asked for. `file_start`: where in the file, in numbers;
    None: in memory."""

    texts: list[Ids]
    file_start: int | None = None
    layers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """Where a text's tokens begin among those of its group, what all texts have in common left out of both."""

    group: int
    start: int


class _Rows:
    """A batch of texts in the making."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._spans: list[Span] = []

    def add(self, ids: Sequence[int], parents: tuple[int, ...], *, ends: bool) -> int:
        self._spans.append(Span(len(self._tokens), len(ids), parents, len(ids) if ends else None))
        self._tokens.extend(ids)
        return len(self._spans) - 1

    def batch(self) -> Batch:
        return Batch(torch.tensor(self._tokens), tuple(self._spans))
