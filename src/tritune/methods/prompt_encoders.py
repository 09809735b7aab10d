"""The networks that make virtual tokens while p-tuning trains, named by where they come from; they are not one net.

    origin          "mlp"                                     "lstm" (two layers, both directions), then linear layers
    peft            D-H-H-D: three linear layers              H each way, 2H-2H-D
    nemo            D-H-D: the two layers it recommends       as peft
    thudm-lama      (none)                                    D/2 each way, D-D-D
    thudm-fewshot   D-D-D                                     D each way, 2D-D-D

thudm-lama and thudm-fewshot are the two code bases of the paper (THUDM/P-tuning, LAMA and PT-Fewshot); nemo is NVIDIA NeMo's
`collections/nlp`. ReLU between linear layers. Knows widths only. Shapes: P virtual tokens, D embedding width, H inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

Origin = Literal["peft", "nemo", "thudm-lama", "thudm-fewshot"]
Kind = Literal["mlp", "lstm"]

LSTM_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Widths:
    """`lstm`: width each way, None: there is none; `linear`: from the input of the first linear layer to the output."""

    lstm: int | None
    linear: tuple[int, ...]

    def size(self, D: int) -> int:
        """Number of parameters."""
        n = sum(a * b + b for a, b in pairwise(self.linear))
        if self.lstm is not None:
            inputs = (D, *[2 * self.lstm] * (LSTM_LAYERS - 1))
            n += 2 * sum(4 * self.lstm * (n_in + self.lstm + 2) for n_in in inputs)
        return n


#: widths by D and H
ENCODERS: Mapping[tuple[Origin, Kind], Callable[[int, int], Widths]] = {
    ("peft", "mlp"): lambda D, H: Widths(None, (D, H, H, D)),
    ("peft", "lstm"): lambda D, H: Widths(H, (2 * H, 2 * H, D)),
    ("nemo", "mlp"): lambda D, H: Widths(None, (D, H, D)),
    ("nemo", "lstm"): lambda D, H: Widths(H, (2 * H, 2 * H, D)),
    ("thudm-lama", "lstm"): lambda D, H: Widths(D // 2, (2 * (D // 2), D, D)),
    ("thudm-fewshot", "lstm"): lambda D, H: Widths(D, (2 * D, D, D)),
    ("thudm-fewshot", "mlp"): lambda D, H: Widths(None, (D, D, D)),
}
#: origins whose inner width is the base's
FIXED = ("thudm-lama", "thudm-fewshot")


class PromptEncoder(nn.Module):
    """An LSTM over the table's rows where there is one, then linear layers row by row: (P, D) to (P, D)."""

    def __init__(self, D: int, widths: Widths) -> None:
        super().__init__()
        self.lstm: nn.LSTM | None = None
        if widths.lstm is not None:
            self.lstm = nn.LSTM(D, widths.lstm, num_layers=LSTM_LAYERS, bidirectional=True, batch_first=True)
        layers = [layer for a, b in pairwise(widths.linear) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.mlp = nn.Sequential(*layers[:-1])

    @property
    def last(self) -> nn.Linear:
        return self.mlp[-1]  # type: ignore[return-value]

    def forward(self, table_PD: Tensor) -> Tensor:
        hidden = table_PD if self.lstm is None else self.lstm(table_PD[None])[0][0]
        prompt_PD: Tensor = self.mlp(hidden)
        return prompt_PD
