"""Every base proves itself at load: rows packed together must answer as each does alone.

A family that mixes tokens outside attention (convolutions, state spaces) leaks between packed rows and would be
silently wrong; here it is refused by name. Solo rows go through transformers' own attention, so this also proves
that the registered function does what the model asks of it (windows, soft caps, scaling), and that the fast twins of its
modules compute what the modules do. Whether the layers of a base can run in two parts is asked when it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tritune.errors import UnsupportedBase
from tritune.models import attention
from tritune.models.base import Batch, Span
from tritune.models.dtype import at_least_float32
from tritune.models.quantised import multiplied_as_numbers

if TYPE_CHECKING:
    from tritune.models.pretrained import Base

#: root mean square of the differences of logits, as a share of their spread: rounding stays below, a leak far above
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2}
#: the same measure for twins beside the modules: they round elsewhere, and in bf16 random rows of a trained base are then
#: 0.03 to 0.05 apart (and 0.07 to 0.1 from what float32 says)
OF_TWINS = TOLERANCE | {torch.bfloat16: 0.1}
#: the same measure, where nothing is rounded otherwise
SAME = 1e-6
LENGTHS = (5, 1, 9, 3)


@torch.no_grad()
@multiplied_as_numbers()
def probe(base: Base) -> float:
    """Relative difference (root mean square) of packed and solo logits on a few short random rows, by the model's own
    modules. Where twins differ by more than rounding they are given up: `base.twins` is False then.

    Raises:
        UnsupportedBase: it is above the tolerance, or the model cannot run packed at all.
    """
    kind = f"{base.name} ({base.config.model_type}, {type(base.model).__name__})"
    rows = _rows(base)
    at, twins = torch.arange(sum(map(len, rows))), base.twins
    base.twins = False
    try:
        packed = base.logits(_batch(rows), at)
    except (TypeError, UnsupportedBase) as error:
        raise UnsupportedBase(f"{kind} cannot run packed rows: {error}") from error
    solo = torch.cat([_solo(base, row) for row in rows])
    difference = _difference(packed, solo)
    if not difference <= TOLERANCE[base.dtype]:
        raise UnsupportedBase(
            f"{kind} answers packed rows differently from the same rows alone (by {difference:.2g} of the logits' spread). "
            "It probably mixes tokens outside attention (convolution, state space, recurrence), and packing would make "
            "its rows leak into each other. tritune cannot adapt it."
        )
    if twins:
        base.twins = _twins_agree(base, rows, packed)
    return difference


def _twins_agree(base: Base, rows: list[Tensor], wanted: Tensor) -> bool:
    """Another version of transformers may compute something new, or call otherwise: its modules are slower, but right. A
    third of the positions at a time: twins leave out what is not asked for."""
    base.twins = True
    found = torch.empty_like(wanted)
    try:
        for first in range(3):
            found[first::3] = base.logits(_batch(rows), torch.arange(first, len(wanted), 3))
    except (TypeError, AttributeError):
        return False
    return _difference(found, wanted) <= OF_TWINS[base.dtype]


@torch.no_grad()
@multiplied_as_numbers()
def parts_are_whole(base: Base, first: int) -> bool:
    """Whether the layers before `first`, and then the others by themselves, give the very logits of all in one pass. They do
    not where a layer reads something else of an earlier one than the stream that goes through all of them."""
    batch = _batch(_rows(base))
    at = torch.arange(len(batch.tokens_N))
    whole, states_ND = base.logits(batch, at), base.states(batch, first)
    if states_ND.shape != (len(at), base.config.hidden_size):
        return False
    return _difference(base.logits(batch, at, (first, states_ND)), whole) <= SAME


def _rows(base: Base) -> list[Tensor]:
    """Random ones; one is longer than a window."""
    generator = torch.Generator().manual_seed(0)
    window = getattr(base.config, "sliding_window", None)
    lengths = LENGTHS if window is None or window > 64 else (*LENGTHS, window + 3)
    return [torch.randint(base.embedding.num_embeddings, (n,), generator=generator) for n in lengths]


def _difference(logits: Tensor, wanted: Tensor) -> float:
    return float((logits - wanted).square().mean().sqrt() / wanted.std())


def _batch(rows: list[Tensor]) -> Batch:
    starts = [sum(map(len, rows[:i])) for i in range(len(rows))]
    return Batch(torch.cat(rows), tuple(Span(s, len(r)) for s, r in zip(starts, rows, strict=True)))


def _solo(base: Base, row: Tensor) -> Tensor:
    twins, base.twins = base.twins, False
    base.model.set_attn_implementation("eager")
    try:
        logits: Tensor = base.model(input_ids=row[None].to(base.device), use_cache=False).logits[0]
    finally:
        base.twins = twins
        base.model.set_attn_implementation(attention.NAME)
    return at_least_float32(logits)
