"""Prefix tuning: keys and values of virtual tokens beside every row, learned for each layer and position
(Li and Liang 2021, arXiv:2101.00190; P-tuning v2: Liu et al. 2022, arXiv:2110.07602).

Deeper than a prompt: what stands in front is free in every layer, not only where it enters the first. As in PEFT, keys and
values are what attention sees (no positions are applied), one per key head where heads are grouped; they take P positions,
so texts start at position P and sliding windows pass over them. Only keys and values are exported; the network that may
produce them while training (the paper's reparameterisation) stays in the training state.

Where they stand is a choice. Behind the text, which is ours and no paper's, the text sees none of them and depends on nothing
that is learned, so its own keys and values are computed once and remembered. What sees them are a few ordinary virtual
tokens there (cues, whose embeddings are learned too) and the answer: all that goes through the base from the second pass on.
Shapes: n layers, P virtual tokens, C cues, K key heads, d head width, D embedding width, H width inside the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from tritune.errors import NotMergeable
from tritune.methods.base import Budget, Delta, Method, Place
from tritune.methods.start import Start, check_text, start_ids
from tritune.models.base import Batch, DeepSegment, Segment, Span
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig, Strategy

NO_WEIGHT = (
    "A prefix is keys and values, not weight: no change of the base's weights puts the same ones beside every row. "
    "Serve it as an adaptation; it costs no base of its own."
)


class Prefix(MethodConfig):
    """Prefix tuning (deep prompts, P-tuning v2).

    tokens: P, number of virtual tokens.
    hidden: H, width of a network that produces the keys and values while training (linear, tanh, linear); null: they are
        the parameters themselves.
    start: "vocabulary": the base's own keys and values for tokens drawn from the frequent ones; "text": those of `text`,
        repeated or cut to P tokens; "random": N(0, 1), or whatever the network makes of it, as PEFT does.
    text: words that describe the task, for start "text".
    dropout: share of the keys' and values' numbers set to zero while training (P-tuning v2).
    placement: "prefix": in front of the row; "suffix": behind its text, before the answer, for all that follows.
    cues: for placement "suffix", C: virtual tokens behind the text that pass through the layers; null: 1. They start as the
        others do, from the last words of `text`.
    """

    tokens: int = Field(default=20, ge=1)
    hidden: int | None = Field(default=None, ge=1)
    start: Start = "vocabulary"
    text: str | None = Field(default=None, min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    placement: Literal["prefix", "suffix"] = "prefix"
    cues: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _text_for_start(self) -> Self:
        check_text(self.start, self.text)
        return self

    @model_validator(mode="after")
    def _cues_for_suffix(self) -> Self:
        if self.cues is not None and self.placement != "suffix":
            raise ValueError("'cues' goes with placement \"suffix\"")
        return self

    @property
    def n_cues(self) -> int:
        """Virtual tokens that pass through the layers."""
        return (self.cues or 1) if self.placement == "suffix" else 0

    def shape(self, base: Base) -> tuple[int, int, int, int, int]:
        """n, 2, P, K, d."""
        n, K, d = base.cache_shape
        return n, 2, self.tokens, K, d


class PrefixDelta(Delta):
    """The keys and values (n, 2, P, K, d); or a table (P, K d), the network that turns it into them, and the keys and values
    it adds to, which stay. Loaded from an export: the keys and values alone. Behind a text: embeddings of cues besides.
    """

    def __init__(
        self,
        config: Prefix,
        table: Tensor,
        cues_CD: Tensor | None,
        network: nn.Module | None = None,
        start_n2PKd: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.put("table", table)
        if cues_CD is not None:
            self.put("cues", cues_CD)
        self.network = network
        self.register_buffer("start", start_n2PKd)
        self.start: Tensor | None

    def layers_n2PKd(self) -> Tensor:
        table = self.get_parameter("table")
        if self.network is None:
            return table
        made: Tensor = self.network(table)
        return made if self.start is None else self.start + made

    def segments(self) -> Sequence[Segment | DeepSegment]:
        layers_n2PKd = F.dropout(self.layers_n2PKd(), self.config.dropout, self.training)
        if not self.config.n_cues:
            return (DeepSegment(layers_n2PKd),)
        return DeepSegment(layers_n2PKd, behind=True), Segment(self.get_parameter("cues"), behind=True)

    def export(self) -> dict[str, Tensor]:
        cues = {"cues": self.get_parameter("cues").detach().clone()} if self.config.n_cues else {}
        return {"prefix": self.layers_n2PKd().detach().clone()} | cues


class Network(nn.Module):
    """Linear, tanh, linear, row by row: from (P, K d) to the keys and values of all layers."""

    def __init__(self, H: int, shape_n2PKd: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        n, two, _, K, d = shape_n2PKd
        self.shape = shape_n2PKd
        self.mlp = nn.Sequential(nn.Linear(K * d, H), nn.Tanh(), nn.Linear(H, n * two * K * d))

    @property
    def last(self) -> nn.Linear:
        return self.mlp[-1]  # type: ignore[return-value]

    def forward(self, table: Tensor) -> Tensor:
        n, two, P, K, d = self.shape
        made: Tensor = self.mlp(table)
        return made.view(P, n, two, K, d).permute(1, 2, 0, 3, 4)


class PrefixMethod(Method[Prefix]):
    kind = "prefix"
    strategy = Strategy.P_TUNING
    Config = Prefix
    summary = "learned keys and values beside the text, in every layer; the base is frozen"
    learning_rate = 5e-3
    variants: ClassVar = (
        Prefix(tokens=3),
        Prefix(tokens=2, hidden=5, dropout=0.1),
        Prefix(tokens=4, start="random"),
        Prefix(tokens=3, hidden=6, start="random"),
        Prefix(tokens=5, start="text", text="abc"),
        Prefix(tokens=4, placement="suffix"),
        Prefix(tokens=3, hidden=5, dropout=0.1, start="random", placement="suffix", cues=2),
    )

    def budget(self, config: Prefix, base: Base) -> Budget:
        n, two, P, K, d = config.shape(base)
        stored = n * two * P * K * d
        trained, H, cues = stored, config.hidden, config.n_cues * base.d_embedding
        if H is not None:
            trained = P * K * d + K * d * H + H + (H + 1) * n * two * K * d
        return Budget(trained=trained + cues, stored=stored + cues, stored_bytes=4 * (stored + cues))

    def virtual_tokens(self, config: Prefix) -> int:
        return config.tokens + config.n_cues

    def prompts(self, config: Prefix) -> Sequence[Place]:
        return ("behind the text",) if config.n_cues else ("in front of the text",)

    def identity_at_start(self, config: Prefix) -> bool:
        return False

    def shapes(self, config: Prefix, base: Base) -> Mapping[str, tuple[int, ...]]:
        cues = {"cues": (config.n_cues, base.d_embedding)} if config.n_cues else {}
        return {"prefix": config.shape(base)} | cues

    def init(self, config: Prefix, base: Base, rng: torch.Generator) -> Delta:
        shape = config.shape(base)
        start = None if config.start == "random" else _start(config, base, rng)
        cues_CD = _cues(config, base, rng)
        if config.hidden is None:
            table = torch.randn(shape, generator=rng) if start is None else start
            return PrefixDelta(config, table, cues_CD).to(base.device)
        with torch.random.fork_rng(devices=[]):  # layers of torch draw from the global generator
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
            network = Network(config.hidden, shape)
        table = torch.randn(config.tokens, shape[3] * shape[4], generator=rng)
        if start is not None:
            nn.init.zeros_(network.last.weight)
            nn.init.zeros_(network.last.bias)
        return PrefixDelta(config, table, cues_CD, network, start).to(base.device)

    def _load(self, config: Prefix, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return PrefixDelta(config, tensors["prefix"], tensors.get("cues")).to(base.device)

    def unmergeable(self, config: Prefix) -> str:
        return NO_WEIGHT

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        raise NotMergeable(NO_WEIGHT)


def _start(config: Prefix, base: Base, rng: torch.Generator) -> Tensor:
    """Keys and values (n, 2, P, K, d) that the base itself computes for the tokens to start from."""
    ids_P = start_ids(base, config.tokens, config.text, rng)
    text = Span(0, config.tokens, text=config.tokens)
    return base.keys_values(Batch(ids_P, (text,))).float().cpu()


def _cues(config: Prefix, base: Base, rng: torch.Generator) -> Tensor | None:
    """Embeddings (C, D) that cues start from."""
    if not config.n_cues:
        return None
    if config.start == "random":
        return torch.randn(config.n_cues, base.d_embedding, generator=rng)
    ids_C = start_ids(base, config.n_cues, config.text, rng, end=True)
    embedded_CD: Tensor = base.embedding(ids_C.to(base.device))
    return embedded_CD.detach().float().cpu()


METHOD = PrefixMethod()
