"""P-tuning: virtual tokens in front of every row, made by a small prompt encoder while training
(Liu et al. 2021, arXiv:2103.10385). Training, not prompting: the vectors are learned by gradient and need not be words.

Only the P x D vectors are exported; the encoder stays in the training state. The encoders have the shapes PEFT gives them
(three linear layers; or a two-layer bidirectional LSTM and two linear layers).
Shapes: P virtual tokens, D embedding width of the base, H width inside the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tritune.errors import NotMergeable
from tritune.methods.base import Budget, Delta, Method
from tritune.models.base import Segment
from tritune.models.load import Base
from tritune.spec import MethodConfig, Strategy

LSTM_LAYERS = 2


class PTuning(MethodConfig):
    """P-tuning.

    tokens: P, number of virtual tokens.
    encoder: "mlp", "lstm" or "none" (the vectors themselves are the parameters: prompt tuning, Lester et al. 2021).
    hidden: H, width inside the encoder; null: the base's embedding width.
    """

    tokens: int = Field(default=20, ge=1)
    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    hidden: int | None = Field(default=None, ge=1)

    def width(self, base: Base) -> int:
        return self.hidden or base.d_embedding


class PTuningDelta(Delta):
    """A table (P, D) and the encoder that turns it into the prompt. Loaded from an export: the prompt alone."""

    def __init__(self, table_PD: Tensor, encoder: nn.Module | None) -> None:
        super().__init__()
        self.put("table", table_PD)
        self.encoder = encoder

    def prompt_PD(self) -> Tensor:
        table_PD = self.get_parameter("table")
        if self.encoder is None:
            return table_PD
        encoded: Tensor = self.encoder(table_PD)
        return encoded

    def segments(self) -> Sequence[Segment]:
        return (Segment(self.prompt_PD()),)

    def export(self) -> dict[str, Tensor]:
        return {"prompt": self.prompt_PD().detach().clone()}


class LstmEncoder(nn.Module):
    """Bidirectional LSTM over the table's rows, then two linear layers."""

    def __init__(self, D: int, H: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(D, H, num_layers=LSTM_LAYERS, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * H, 2 * H), nn.ReLU(), nn.Linear(2 * H, D))

    def forward(self, table_PD: Tensor) -> Tensor:
        prompt_PD: Tensor = self.mlp(self.lstm(table_PD[None])[0][0])
        return prompt_PD


def _mlp(D: int, H: int) -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D))


def _encoder_size(config: PTuning, D: int, H: int) -> int:
    if config.encoder == "mlp":
        return D * H + H * H + H * D + 2 * H + D
    if config.encoder == "lstm":
        one_way = [4 * H * (n_in + H + 2) for n_in in (D, *[2 * H] * (LSTM_LAYERS - 1))]
        return 2 * sum(one_way) + 2 * H * 2 * H + 2 * H + 2 * H * D + D
    return 0


class PTuningMethod(Method[PTuning]):
    kind = "ptuning"
    strategy = Strategy.P_TUNING
    Config = PTuning
    summary = "learned virtual tokens in front of the text; the base is frozen"
    learning_rate = 3e-3
    variants: ClassVar = (
        PTuning(tokens=3, hidden=8),
        PTuning(tokens=2, encoder="lstm", hidden=5),
        PTuning(tokens=4, encoder="none"),
    )

    def budget(self, config: PTuning, base: Base) -> Budget:
        D, H = base.d_embedding, config.width(base)
        stored = config.tokens * D
        return Budget(trained=stored + _encoder_size(config, D, H), stored=stored, stored_bytes=4 * stored)

    def identity_at_start(self, config: PTuning) -> bool:
        return False

    def shapes(self, config: PTuning, base: Base) -> Mapping[str, tuple[int, ...]]:
        return {"prompt": (config.tokens, base.d_embedding)}

    def init(self, config: PTuning, base: Base, rng: torch.Generator) -> Delta:
        D, H = base.d_embedding, config.width(base)
        with torch.random.fork_rng(devices=[]):  # layers of torch draw from the global generator
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
            encoder = {"mlp": _mlp, "lstm": LstmEncoder}[config.encoder](D, H) if config.encoder != "none" else None
            table_PD = torch.randn(config.tokens, D) if encoder else _vocabulary_rows(base, config.tokens)
        return PTuningDelta(table_PD, encoder).to(base.device)

    def _load(self, config: PTuning, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
        return PTuningDelta(tensors["prompt"].to(base.device), None)

    def merge(self, delta: Delta, base: Base) -> dict[str, Tensor]:
        raise NotMergeable(
            "A p-tuned prompt is input, not weight: no change of the base's weights puts the same vectors in front of every "
            "row. Serve it as an adaptation; it is a few kilobytes and costs no base of its own."
        )


def _vocabulary_rows(base: Base, n: int) -> Tensor:
    """Embeddings of random tokens: without an encoder, vectors of the base's own scale learn far sooner than N(0, 1)."""
    ids = torch.randint(base.embedding.num_embeddings, (n,))
    rows_PD: Tensor = base.embedding(ids.to(base.device))
    return rows_PD.detach().cpu()


METHOD = PTuningMethod()
