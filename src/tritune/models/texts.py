"""What texts are to the frozen base, kept from pass to pass: in memory up to a bound, then in a file.

That is the keys and values of all layers, while virtual tokens behind the text are trained, or the hidden states that enter
the first layer that something learned reaches: neither changes. Texts, and answers behind them, are named by their token ids
and computed in groups that depend on the whole set of texts alone, so a run that goes on after a stop sees the very same
numbers. Knows no model: how the numbers are computed is passed in. Shapes: M tokens.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor

from tritune.models.base import Batch, Span
from tritune.text.pack import shared_beginning

#: tokens that are computed at once
GROUP_TOKENS = 1024

Ids = tuple[int, ...]
#: texts, each from its first token on, and what of their answers goes through the base behind them
Texts = Mapping[Ids, Collection[Ids]]


class TextCache:
    """Numbers of known texts and of the answers behind them; those of others are computed whenever they are asked for.

    Args:
        compute: what is kept, of every token of a batch in its order: (..., M, ...).
        texts: what will be asked for again.
        numbers: how many there are of one token.
        dim: the dimension that counts tokens in what `compute` gives.
        dtype: the format that `compute` gives.
        path: where the file may be; it is made when it is needed.
        memory, disk: bytes that may be held in memory, and in the file. Texts beyond both are as if unknown.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Tensor],
        texts: Texts,
        *,
        numbers: int,
        dim: int,
        dtype: torch.dtype,
        path: Path,
        memory: int,
        disk: int,
    ) -> None:
        self._compute = compute
        self._texts = {text: tuple(dict.fromkeys(filter(None, answers))) for text, answers in texts.items()}
        self._numbers, self._dim = numbers, dim
        self._dtype = dtype
        self._path = path
        self._memory, self._disk = memory, disk
        self._shape = torch.Size()  # of what was computed last

    def of(self, batch: Batch) -> Tensor:
        """What `compute` gives for this batch, up to rounding."""
        tokens, spans = batch.tokens_N.tolist(), batch.spans
        parts: dict[int, Tensor] = {}
        unknown: set[int] = set()
        for i in reversed(range(len(spans))):  # what a span sees stands before it, and is a part of its line
            if i in parts:
                continue
            row = self._rows.get(_line(tokens, spans, i))
            at = 0
            for j in (*spans[i].parents, i):
                piece = spans[j]
                if row is None:
                    unknown.add(j)
                elif j not in parts:
                    parts[j] = self._part(row, at, at + piece.length)
                at += piece.length
        if unknown:
            parts = self._computed(batch, sorted(unknown)) | parts
        found = torch.cat([parts[i] for i in range(len(spans))], self._dim)
        self._file.let_go()
        return found

    def knows(self, batch: Batch) -> bool:
        """Whether any of its rows is known."""
        tokens = batch.tokens_N.tolist()
        return any(_line(tokens, batch.spans, i) in self._rows for i in range(len(batch.spans)))

    def _computed(self, batch: Batch, indexes: Sequence[int]) -> dict[int, Tensor]:
        """Numbers of some spans; what they see is among them."""
        found = {old: new for new, old in enumerate(indexes)}
        builder = _Rows()
        for i in indexes:
            span = batch.spans[i]
            ids = batch.tokens_N[span.start : span.start + span.length].tolist()
            builder.add(ids, tuple(found[p] for p in span.parents), ends=span.text is not None)
        parts = torch.split(self._compute(builder.batch()), [batch.spans[i].length for i in indexes], self._dim)
        return dict(zip(indexes, parts, strict=True))

    def _part(self, row: _Row, begin: int, end: int) -> Tensor:
        """Numbers of a known row's tokens from `begin` to `end`: of what all texts begin with, of its text, of its answer."""
        n, piece = self._n_common, self._piece(self._groups[row.group], row.start, row.size)
        runs = (
            (begin, min(end, n), self._common if begin < n else piece, 0),
            (max(begin, n), min(end, row.length), piece, -n),
            (max(begin, row.length), end, piece, row.answer - row.length),
        )
        found = [of.narrow(self._dim, shift + first, last - first) for first, last, of, shift in runs if first < last]
        return found[0] if len(found) == 1 else torch.cat(found, self._dim)

    def _piece(self, group: _Group, start: int, size: int) -> Tensor:
        """Numbers of so many tokens of a group, a text's with its answers'."""
        if group.numbers is None:
            self._fill(group)
        assert group.numbers is not None
        return self._place(group.numbers, start, size)

    def _place(self, numbers: Tensor, start: int, size: int) -> Tensor:
        shape = list(self._shape)
        shape[self._dim] = size
        return numbers[self._numbers * start : self._numbers * (start + size)].view(shape)

    def _fill(self, group: _Group) -> None:
        """Compute all texts of a group with their answers, without what all texts begin with. Those of one text lie together:
        whoever reads it then reads no other's pages."""
        n, builder = self._n_common, _Rows()
        parents = (builder.add(group.texts[0][:n], (), ends=False),) if n else ()
        for text in group.texts:
            own = builder.add(text[n:], parents, ends=True)
            for answer in self._texts[text]:
                builder.add(answer, (*parents, own), ends=False)
        computed = self._compute(builder.batch())
        self._shape = computed.shape
        sizes = [self._tokens(text) for text in group.texts]
        size = self._numbers * sum(sizes)
        if group.file_start is None:
            group.numbers = torch.empty(size, dtype=self._dtype)
        else:
            group.numbers = self._file.numbers[group.file_start : group.file_start + size]
        for start, end in pairwise(accumulate(sizes, initial=0)):
            self._place(group.numbers, start, end - start).copy_(computed.narrow(self._dim, n + start, end - start))

    # --- what goes where: depends on the texts and the bounds alone ---

    @cached_property
    def _n_common(self) -> int:
        """How many first tokens all texts have in common; they are held once."""
        return shared_beginning(list(self._texts)) if self._texts else 0

    @cached_property
    def _common(self) -> Tensor:
        builder = _Rows()
        builder.add(next(iter(self._texts))[: self._n_common], (), ends=True)
        return self._compute(builder.batch())

    @cached_property
    def _groups(self) -> list[_Group]:
        groups: list[_Group] = []
        in_memory = in_file = 0
        for texts in self._together():
            size = self._numbers * sum(map(self._tokens, texts)) * self._dtype.itemsize
            if in_memory + size <= self._memory:
                groups.append(_Group(texts))
                in_memory += size
            elif in_file + size <= self._disk:
                groups.append(_Group(texts, in_file // self._dtype.itemsize))
                in_file += size
        return groups

    def _tokens(self, text: Ids) -> int:
        """Of a text and its answers, without what all texts begin with."""
        return len(text) - self._n_common + sum(map(len, self._texts[text]))

    def _together(self) -> list[list[Ids]]:
        """Texts of similar length, about `GROUP_TOKENS` tokens each time."""
        groups: list[list[Ids]] = []
        left = 0
        for text in sorted(self._texts, key=len):
            if left < len(text):
                groups.append([])
                left = GROUP_TOKENS
            groups[-1].append(text)
            left -= self._tokens(text)
        return groups

    @cached_property
    def _rows(self) -> dict[Ids, _Row]:
        rows = {}
        for index, group in enumerate(self._groups):
            start = 0
            for text in group.texts:
                size, behind = self._tokens(text), len(text) - self._n_common
                rows[text] = _Row(index, start, size, len(text), behind)
                for answer in self._texts[text]:
                    rows[text + answer] = _Row(index, start, size, len(text), behind)
                    behind += len(answer)
                start += size
        return rows

    @cached_property
    def _file(self) -> _MappedFile:
        tokens = sum(self._tokens(t) for g in self._groups if g.file_start is not None for t in g.texts)
        return _MappedFile(self._path, self._numbers * tokens, self._dtype)


class _MappedFile:
    """A file of so many numbers, of which only those are in memory that were read since it was last let go."""

    def __init__(self, path: Path, n: int, dtype: torch.dtype) -> None:
        self._map: mmap.mmap | None = None
        self.numbers = torch.empty(0, dtype=dtype)
        if n == 0:
            return
        with path.open("w+b") as file:
            file.truncate(n * dtype.itemsize)
            self._map = mmap.mmap(file.fileno(), 0)
        self.numbers = torch.frombuffer(self._map, dtype=dtype)

    def let_go(self) -> None:
        """Its pages are the system's own from here on; what was written is kept. (Windows has no such call.)"""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _line(tokens: Sequence[int], spans: Sequence[Span], i: int) -> Ids:
    """All that a span's last token sees."""
    line = [spans[j] for j in (*spans[i].parents, i)]
    return tuple(t for span in line for t in tokens[span.start : span.start + span.length])


@dataclass(slots=True)
class _Group:
    """Texts that are computed together, when one of them is first asked for. `file_start`: where in the file, in numbers;
    None: in memory."""

    texts: list[Ids]
    file_start: int | None = None
    numbers: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """Where a text of `length` tokens and its answers lie among the tokens of their group, what all texts have in common
    left out: `size` of them from `start` on. Of these, the row's own answer begins at `answer`."""

    group: int
    start: int
    size: int
    length: int
    answer: int


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
