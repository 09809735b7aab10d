"""A part of a model's layers by itself: up to the first one that something learned reaches, or from there on.

What comes out of the layers below it is the same in every pass, and is kept (`texts.py`). The model's own forward runs either
way, with its positions, scales and masks by layer; a layer that is left out hands on what it gets. Whether both parts in turn
are the whole, `probe.py` tells. Knows layers; no family, no method. Shapes: N tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Forward = Callable[..., Any]


@contextmanager
def below(layers: nn.ModuleList, first: int) -> Iterator[list[Any]]:
    """Only the layers before `first` run; the list gets what the last of them gives."""
    found: list[Any] = []
    handle = layers[first - 1].register_forward_hook(lambda _, __, output: found.append(output))
    try:
        with _instead(layers[first:], _handed_on):
            yield found
    finally:
        handle.remove()


@contextmanager
def above(layers: nn.ModuleList, first: int, states_ND: Tensor) -> Iterator[None]:
    """Only the layers from `first` on run; it gets these states, whatever the model embeds meanwhile."""
    with (
        _instead(layers[: first - 1], _handed_on),
        _instead(layers[first - 1 : first], lambda *_, **__: states_ND[None]),
    ):
        yield


def _handed_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


@contextmanager
def _instead(layers: Iterable[nn.Module], forward: Forward) -> Iterator[None]:
    """Another forward for some layers, as long as the context is open."""
    own = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer, _ in own:
            layer.forward = forward
        yield
    finally:
        for layer, before in own:
            if before is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = before
