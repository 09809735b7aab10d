"""Edits bound to a model: hooks on exactly the sites that are asked for, released whatever happens.

The forward pass itself stays transformers' own. Knows places and edits, no method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tritune.models.base import LINEAR_ROLES, Edits, NoEdits, Role
from tritune.models.memory import MadeAgain
from tritune.models.sites import Place

#: the tokens of a term that is every row's
EVERYWHERE: dict[int | None, tuple[slice, ...]] = {None: (slice(None),)}


@dataclass(frozen=True, slots=True)
class Read:
    """The packed tokens that anything reads once the last layer has attended (R, in their order), some more that nobody
    does (to a round number, of no slot), and where the tokens of each slot lie among them."""

    at_R: Tensor
    n_filling: int
    slot_R: Tensor | None
    runs: Mapping[int | None, tuple[slice, ...]]


class Stream:
    """What the modules of a base share: the edits that are bound and where they act, whether the fast twins run, the
    slots of the tokens on their way and of the positions K at the head, where the tokens of each slot lie (None: all of
    them), which are read in the end (None: perhaps all), what entered each site, and what is made again in the backward."""

    def __init__(self) -> None:
        self.edits: Edits = NoEdits()
        self.edited: frozenset[str] = frozenset()
        self.fast = True
        self.slot_N: Tensor | None = None
        self.slot_K: Tensor | None = None
        self.runs: Mapping[int | None, tuple[slice, ...]] = EVERYWHERE
        self.read: Read | None = None
        self.entered: dict[str, Tensor] = {}
        self.again = MadeAgain()

    def of_read(self, x_ND: Tensor, compute: Callable[[Tensor], Tensor], width: int) -> Tensor:
        """What `compute` makes of every token (N, width), for the tokens that are read; zeros for the others."""
        read = self.read
        if read is None:
            return compute(x_ND)
        y_NE = x_ND.new_zeros(len(x_ND), width)
        if not len(read.at_R):
            return y_NE
        before, self.slot_N, self.runs = (self.slot_N, self.runs), read.slot_R, read.runs
        try:
            y_RE = compute(F.pad(x_ND.index_select(0, read.at_R), (0, 0, 0, read.n_filling)))
        finally:
            self.slot_N, self.runs = before
        return y_NE.index_copy_(0, read.at_R, y_RE[: len(read.at_R)])


@contextmanager
def hooked(places: Sequence[Place], edits: Edits, stream: Stream) -> Iterator[None]:
    """Call `edits.enter` and `edits.edit` at these places while the context is open."""
    with ExitStack() as stack:
        stack.callback(stream.entered.clear)  # a forward pass that failed half-way has left its activations there
        for place in places:
            for handle in _hooks(place, edits, stream):
                stack.callback(handle.remove)
        yield


def _hooks(place: Place, edits: Edits, stream: Stream) -> list[RemovableHandle]:
    """At a block, what enters is remembered when it enters: by the end the layer has moved on."""
    key, at_head = place.site.key, place.site.role is Role.HEAD
    may_enter = place.site.role in LINEAR_ROLES and place.columns is None

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        x_ND = x.reshape(-1, x.shape[-1])
        stream.entered[key] = edits.enter(place.site, x_ND, stream.slot_N) if may_enter else x_ND
        if stream.entered[key] is x_ND:
            return None
        entering = stream.entered[key].view(x.shape)
        return ((entering, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": entering})

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        y_NE = y.reshape(-1, y.shape[-1])
        slots = stream.slot_K if at_head else stream.slot_N
        edited = _edit(place, edits, stream.entered.pop(key), y_NE, slots).view(y.shape)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return [
        place.entry.register_forward_pre_hook(before, with_kwargs=True),
        place.module.register_forward_hook(after, with_kwargs=True),
    ]


def _edit(place: Place, edits: Edits, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
    if place.columns is None:
        return edits.edit(place.site, x_ND, y_NE, slot_N)
    columns = place.columns.to(y_NE.device)
    return y_NE.index_copy(1, columns, edits.edit(place.site, x_ND, y_NE[:, columns], slot_N))
