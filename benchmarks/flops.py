"""How much arithmetic a training step needs: the numerator of MFU. Plain numbers; knows no torch and no model.

Only necessary work counts: real tokens, never padding; the head on supervised positions only; gradients of weights only
where weights train; gradients of inputs only above the lowest place that trains; a shared virtual prompt once per batch;
nothing recomputed. One multiply-add is two operations. Norms, rotations, softmax and the optimizer are not counted.
Symbols: N weights of the trunk's linear maps, E = vocabulary x width of the head, A adapter weights on a token's way,
T tokens of a row, m virtual tokens, s supervised positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder of the Llama kind (grouped heads, gated feed-forward)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """From the fields of a `config.json`."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocabulary=config["vocab_size"],
        )

    @property
    def qkv(self) -> int:
        """Weights of one layer's query, key and value maps."""
        return self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)

    @property
    def layer(self) -> int:
        """Weights of one layer's linear maps."""
        return self.qkv + self.hidden * self.head_dim * self.heads + 3 * self.hidden * self.intermediate

    @property
    def trunk(self) -> int:
        """N."""
        return self.layers * self.layer

    @property
    def head(self) -> int:
        """E."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True, slots=True)
class Work:
    """What one optimizer step is asked to do.

    Attributes:
        lengths: T of each row.
        supervised: s, of all rows together.
        added: operations a forward pass gains per token by the adapters (2A).
        virtual: m, computed once per step.
        keys: so many more are given, and computed by nobody; every token of a row sees them (cached: every computed one).
        encoder: weights of what makes the virtual tokens, or the keys, run over each of them.
        cached: the virtual tokens stand behind the text, whose keys and values are there already: each row has its own
            m, and computes nothing but these and its answer.
    """

    lengths: Sequence[int]
    supervised: int
    added: int = 0
    virtual: int = 0
    keys: int = 0
    encoder: int = 0
    cached: bool = False

    @property
    def tokens(self) -> int:
        """That go through the base."""
        if not self.cached:
            return sum(self.lengths) + self.virtual
        answers = self.supervised - len(self.lengths)  # the last token of each is only predicted
        return self.virtual * len(self.lengths) + answers

    @property
    def seen(self) -> int:
        """Pairs of a token and one that it sees, itself included. Cached: as if all answers were of one length."""
        m = self.virtual
        if not self.cached:
            return sum(T * (T + 1) // 2 + T * (m + self.keys) for T in self.lengths) + m * (m + 1) // 2
        answer = self.supervised / len(self.lengths) - 1
        own = m + answer
        return round(sum(own * (T - answer + self.keys) + own * (own + 1) / 2 for T in self.lengths))


def below(shape: Shape, kind: str, work: Work) -> int:
    """Weights of the trunk through which no gradient has to flow on to their inputs, because nothing trains there or earlier.
    Virtual tokens that are computed enter below everything.

    Raises:
        KeyError: a method nobody has counted yet.
    """
    counts = {
        "full": 0,  # the embedding trains too
        "lora": shape.qkv,
        "ia3": shape.qkv,
        "prefix": 0 if work.virtual else shape.qkv,
        "bottleneck": shape.layer,  # the first one stands behind the first feed-forward
        "ptuning": 0,  # the prompt enters below everything
    }
    return counts[kind]


def attention_forward(shape: Shape, work: Work) -> int:
    """Scores and weighted sums of every token with its own past, itself and the virtual tokens, all layers."""
    return 4 * shape.layers * shape.heads * shape.head_dim * work.seen


def step(shape: Shape, kind: str, work: Work) -> int:
    """Operations of one optimizer step, forward and backward.

    full 6(N + E s/T), LoRA and bottleneck 4N + 6A + 4E s/T, p-tuning 4N (1 + m / all T) + 4E s/T per token, plus attention
    (forward 2 products, backward 4), less what `below` spares.
    """
    tokens = work.tokens
    forward = 2 * shape.trunk * tokens
    to_inputs = 2 * (shape.trunk - below(shape, kind, work)) * tokens
    to_weights = 2 * shape.trunk * tokens if kind == "full" else 0
    head = (6 if kind == "full" else 4) * shape.head * work.supervised
    adapters = 3 * work.added * tokens
    encoder = 6 * work.encoder * (work.keys or work.virtual)
    return forward + to_inputs + to_weights + head + adapters + encoder + 3 * attention_forward(shape, work)
