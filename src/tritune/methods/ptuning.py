"""P-tuning: virtual tokens around every row's text, made by a small prompt encoder while training
(Liu et al. 2021, arXiv:2103.10385). Training, not prompting: the vectors are learned by gradient and need not be words.

Where they stand is a choice. In front of the text they pass through the base once per batch. Behind it they pass once per
row, but the text then depends on nothing that is learned, so nothing is propagated back through it. Around the text, as in
the paper's template {[P0..Pi], x, [Pi+1..Pm], y}, one encoder makes both groups.

Only the P x D vectors are exported; the encoder stays in the training state. Encoders are named by where they come from (see
`prompt_encoders.py`); the default has the shapes that PEFT gives them. By default the encoder learns what to add to
embeddings of ordinary tokens and begins by adding nothing (the residual form of Razdaibiedina et al. 2023,
arXiv:2305.03937): the prompt starts where the base has seen input, which saves most of the warm-up of a random start.
Shapes: P virtual tokens, D embedding width of the base, H width inside the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tritune.errors import NotMergeable
from tritune.methods.base import Budget, Delta, Method, Place
from tritune.methods.prompt_encoders import ENCODERS, FIXED, Origin, PromptEncoder, Widths
from tritune.methods.start import Start, check_text, start_ids
from tritune.models.base import Segment
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig, Strategy

NO_WEIGHT = (
    "A p-tuned prompt is input, not weight: no change of the base's weights puts the same vectors beside every row's text. "
    "Serve it as an adaptation; it is a few kilobytes and costs no base of its own."
)


class PTuning(MethodConfig):
    """P-tuning.

    tokens: P, number of virtual tokens.
    encoder: "mlp", "lstm" or "none" (the vectors themselves are the parameters: prompt tuning, Lester et al. 2021).
    origin: whose encoder: "peft", "nemo", or one of the paper's own, "thudm-lama" (with "lstm") and "thudm-fewshot".
    start: "vocabulary": embeddings of tokens drawn from the frequent ones; "text": those of `text`, repeated or cut to
        P tokens; "random": whatever the encoder makes of N(0, 1), as PEFT does.
    text: words that describe the task, for start "text".
    hidden: H, width inside the encoder; null: the base's embedding width.
    placement: "prefix": in front of the row; "suffix": behind its text, before the answer; "around": `front` tokens in
        front, the others behind.
    front: for placement "around", how many tokens stand in front.
    """

    tokens: int = Field(default=20, ge=1)
    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    origin: Origin = "peft"
    start: Start = "vocabulary"
    text: str | None = Field(default=None, min_length=1)
    hidden: int | None = Field(default=None, ge=1)
    placement: Literal["prefix", "suffix", "around"] = "prefix"
    front: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _text_for_start(self) -> Self:
        check_text(self.start, self.text)
        return self

    @model_validator(mode="after")
    def _front_for_around(self) -> Self:
        if (self.placement == "around") != (self.front is not None):
            raise ValueError('\'front\' goes with placement "around", and placement "around" needs it')
        if self.front is not None and self.front >= self.tokens:
            raise ValueError(
                f"'front' is {self.front} of {self.tokens} tokens: placement \"around\" leaves some for behind"
            )
        return self

    @property
    def n_front(self) -> int:
        """How many tokens stand in front of the row."""
        return {"prefix": self.tokens, "suffix": 0, "around": self.front or 0}[self.placement]

    @model_validator(mode="after")
    def _encoder_of_origin(self) -> Self:
        if self.encoder == "none":
            if self.origin != "peft":
                raise ValueError(f"origin '{self.origin}' names an encoder, and 'encoder' is \"none\"")
        elif (self.origin, self.encoder) not in ENCODERS:
            raise ValueError(f"origin '{self.origin}' has no encoder '{self.encoder}'")
        if self.hidden is not None and self.origin in FIXED:
            raise ValueError(f"the encoder of '{self.origin}' is as wide as the base: leave 'hidden' out")
        return self

    def widths(self, base: Base) -> Widths | None:
        """Of the encoder; None: there is none."""
        if self.encoder == "none":
            return None
        return ENCODERS[self.origin, self.encoder](base.d_embedding, self.hidden or base.d_embedding)


class PTuningDelta(Delta):
    """A table (P, D), the encoder that turns it into the prompt, and the embeddings it adds to, which stay.

    Loaded from an export: the prompt alone.
    """

    def __init__(
        self, config: PTuning, table_PD: Tensor, encoder: nn.Module | None, start_PD: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.put("table", table_PD)
        self.encoder = encoder
        self.register_buffer("start", start_PD)
        self.start: Tensor | None

    def prompt_PD(self) -> Tensor:
        table_PD = self.get_parameter("table")
        if self.encoder is None:
            return table_PD
        encoded_PD: Tensor = self.encoder(table_PD)
        return encoded_PD if self.start is None else self.start + encoded_PD

    def segments(self) -> Sequence[Segment]:
        prompt_PD, n = self.prompt_PD(), self.config.n_front
        groups = (Segment(prompt_PD[:n]), Segment(prompt_PD[n:], behind=True))
        return tuple(group for group in groups if len(group.embeddings_PD))

    def export(self) -> dict[str, Tensor]:
        return {"prompt": self.prompt_PD().detach().clone()}


class PTuningMethod(Method[PTuning]):
    kind = "ptuning"
    strategy = Strategy.P_TUNING
    Config = PTuning
    summary = "learned virtual tokens beside the text; the base is frozen"
    learning_rate = 2e-3
    variants: ClassVar = (
        PTuning(tokens=3, hidden=8),
        PTuning(tokens=2, encoder="lstm", hidden=5),
        PTuning(tokens=4, encoder="none"),
        PTuning(tokens=3, hidden=6, start="random"),
        PTuning(tokens=5, hidden=6, start="text", text="abc"),
        PTuning(tokens=3, hidden=8, placement="suffix"),
        PTuning(tokens=4, encoder="lstm", hidden=5, placement="around", front=1),
        PTuning(tokens=4, origin="nemo", hidden=8),
        PTuning(tokens=3, encoder="lstm", origin="thudm-lama", placement="around", front=2),
    )

    def budget(self, config: PTuning, base: Base) -> Budget:
        stored, widths = config.tokens * base.d_embedding, config.widths(base)
        size = 0 if widths is None else widths.size(base.d_embedding)
        return Budget(trained=stored + size, stored=stored, stored_bytes=4 * stored)

    def virtual_tokens(self, config: PTuning) -> int:
        return config.tokens

    def prompts(self, config: PTuning) -> Sequence[Place]:
        places: dict[Place, int] = {
            "in front of the text": config.n_front,
            "behind the text": config.tokens - config.n_front,
        }
        return [place for place, tokens in places.items() if tokens]

    def identity_at_start(self, config: PTuning) -> bool:
        return False

    def shapes(self, config: PTuning, base: Base) -> Mapping[str, tuple[int, ...]]:
        return {"prompt": (config.tokens, base.d_embedding)}

    def init(self, config: PTuning, base: Base, rng: torch.Generator) -> Delta:
        with torch.random.fork_rng(devices=[]):  # layers of torch draw from the global generator
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
            encoder = new_encoder(config, base)
            table_PD, start_PD = new_vectors(config, base)
        if encoder is None:
            return PTuningDelta(config, table_PD if start_PD is None else start_PD, None).to(base.device)
        return PTuningDelta(config, table_PD, encoder, start_PD).to(base.device)

    def _load(self, config: PTuning, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return PTuningDelta(config, tensors["prompt"].to(base.device), None)

    def unmergeable(self, config: PTuning) -> str:
        return NO_WEIGHT

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        raise NotMergeable(NO_WEIGHT)


def new_encoder(config: PTuning, base: Base) -> PromptEncoder | None:
    """A fresh encoder, drawn by torch's own generator; None: the config has none."""
    widths = config.widths(base)
    if widths is None:
        return None
    encoder = PromptEncoder(base.d_embedding, widths)
    if config.start != "random":  # begins by adding nothing
        nn.init.zeros_(encoder.last.weight)
        nn.init.zeros_(encoder.last.bias)
    return encoder


def new_vectors(config: PTuning, base: Base, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
    """A table (P, D), and the embeddings (P, D) that the prompt starts from, if any."""
    table_PD = torch.randn(config.tokens, base.d_embedding, generator=rng)
    if config.start == "random":
        return table_PD, None
    start_PD: Tensor = base.embedding(start_ids(base, config.tokens, config.text, rng).to(base.device))
    return table_PD, start_PD.detach().cpu()


METHOD = PTuningMethod()
