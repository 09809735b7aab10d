"""The vocabulary of a base: sites, spans, batches, segments, and `Edits`, the one door into its forward pass.

Data and protocols only: knows no transformers model, no method, no task. `pretrained.py` has the base itself.
Shapes: N packed tokens, B spans, P virtual tokens, D model width, E output width of a site; n layers, K key heads, d head
width (n2PKd: a key and a value of every layer).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

#: label of a position where no loss is taken
IGNORE = -100
#: slot of a row that the bare base answers
BARE = -1


class Role(StrEnum):
    """What a site does in its layer; the same words for every family."""

    ATTN_Q = "attn.q"
    ATTN_K = "attn.k"
    ATTN_V = "attn.v"
    ATTN_O = "attn.o"
    MLP_GATE = "mlp.gate"
    MLP_UP = "mlp.up"
    MLP_DOWN = "mlp.down"
    BLOCK_ATTN = "block.attn"
    BLOCK_MLP = "block.mlp"
    EMBED = "embed"
    HEAD = "head"


#: roles that are one linear map of a layer
LINEAR_ROLES = tuple(role for role in Role if role.startswith(("attn.", "mlp.")))
#: roles before the first layer and behind the last
END_ROLES = (Role.EMBED, Role.HEAD)


@dataclass(frozen=True, slots=True)
class Site:
    """A place where something learned may act.

    At a linear role, x is what goes into the linear map and y what comes out of it. At a block role, x is the residual
    stream that enters the sub-layer (before any norm) and y what the sub-layer is about to add to it. At the embedding,
    x is token ids (N,), y their rows of the table before anything that the family multiplies them by, and D the vocabulary.
    The head sees scored positions only.
    """

    key: str  # "layers.3.attn.q" (or "embed", "head"): ours, stable on disk, the same for every family
    role: Role
    layer: int  # of the embedding -1, of the head one beyond the last
    d_in: int
    d_out: int


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive packed tokens that attend to each other causally, and to all tokens of their `parents`.

    `parents` are indexes of earlier spans, in the order of their positions: a shared instruction, then a row's context,
    then (this span) one of its possible answers. Positions count on from the last parent's end.

    `text`: so many of the span's first tokens end a row's text, and an answer may follow. Virtual tokens that stand behind
    the text come there. None: no row's text ends in this span. A row's text ends once: no parent of this span is marked.
    """

    start: int
    length: int
    parents: tuple[int, ...] = ()
    text: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows end to end, no padding.

    Args:
        tokens_N: token ids of all spans, one after the other.
        spans: what lies where; a span's parents come before it.
        labels_N: the id to be predicted *at* each position (already shifted), IGNORE where no loss is taken.
        slots: the adaptation of each span; None: one adaptation (or none) for all. A parent's slot is its children's.
    """

    tokens_N: Tensor
    spans: tuple[Span, ...]
    labels_N: Tensor | None = None
    slots: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """Virtual tokens of one adaptation.

    In front of its rows they pass through the base once per batch. Behind a row's text (and before its answers) they see
    the text, so they pass once per row.
    """

    embeddings_PD: Tensor
    slot: int | None = None  # None: of every row
    behind: bool = False


@dataclass(frozen=True, slots=True)
class DeepSegment:
    """Keys and values beside every row of one adaptation, for every layer. They take P positions, and are what attention sees
    there: no positions are applied to them.

    In front, all of a row sees them. Behind its text only what follows the text does: first of all the virtual tokens of a
    `Segment` behind it, of which at least one has to be there, since the end of the text no longer says what comes next.
    """

    layers_n2PKd: Tensor
    slot: int | None = None  # None: of every row
    behind: bool = False


@dataclass(frozen=True, slots=True)
class LowRank:
    """A term scale * (x Aᵀ) Bᵀ that is added to the output of a linear map."""

    A_rD: Tensor
    B_Er: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Scales:
    """Factors of what enters a linear map, of what leaves it, or of both: y = out * (W (in * x) + b)."""

    in_D: Tensor | None
    out_E: Tensor | None


class Edits(Protocol):
    """The only thing that changes a forward pass of a base."""

    def sites(self) -> Sequence[Site]:
        """Where `enter` and `edit` want to be called; everywhere else the base is untouched."""
        ...

    def segments(self) -> Sequence[Segment | DeepSegment]:
        """Virtual tokens: per slot at most one segment in front, of either kind, and behind the text one or, with keys and
        values there, one of each. Called once per forward pass, inside the autograd graph."""
        ...

    def enter(self, site: Site, x_ND: Tensor, slot_N: Tensor | None) -> Tensor:
        """What goes into a linear map (N, D) instead of x. Called only at linear sites that share their input with no
        other site (q, k and v of one fused matrix do): `Rows.fused` tells which. Not at the embedding and the head."""
        ...

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        """The new output (N, E) of a site. `slot_N`: slot of each token, None where the batch has no slots. x is what
        `enter` returned."""
        ...

    def low_rank(self, site: Site) -> LowRank | Mapping[int, LowRank] | None:
        """What `edit` does at a linear site, where that is nothing but a low-rank term: the base may then compute it
        together with its own product instead of calling `edit`. A mapping: of each slot's rows; others have none. None:
        call `edit`. Asked anew in every forward pass."""
        ...

    def scales(self, site: Site) -> Scales | None:
        """What `enter` and `edit` do at a linear site, where that is nothing but scaling, on the same terms as `low_rank`."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Base weights replaced as a whole, by parameter name (full fine-tuning); empty for everything else."""
        ...

    def slots(self) -> Collection[int] | None:
        """The slots that are answered here, beside BARE; None: every row is answered alike, whatever its slot."""
        ...


class NoEdits:
    """The bare base."""

    def sites(self) -> Sequence[Site]:
        return ()

    def segments(self) -> Sequence[Segment | DeepSegment]:
        return ()

    def enter(self, site: Site, x_ND: Tensor, slot_N: Tensor | None) -> Tensor:
        return x_ND

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        return y_NE

    def low_rank(self, site: Site) -> LowRank | None:
        return None

    def scales(self, site: Site) -> Scales | None:
        return None

    def weights(self) -> Mapping[str, Tensor]:
        return {}

    def slots(self) -> None:
        return None
