"""Slow, clear twins of the fast paths: attention query by query, rows alone through stock transformers.

Nothing here shares code with what it checks: no layout, no registered attention function, no packing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tritune.models.base import Batch, Span
from tritune.models.fast import StandIn
from tritune.models.head import Head
from tritune.models.load import load_base
from tritune.models.locate import PACKAGED_BASES
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.spec import Quantisation


@cache
def base_of(name: str) -> Base:
    """One base per name and process, tiny or packaged. Tests never change a base."""
    return load_base(name, dtype="float32", device="cpu") if name in PACKAGED_BASES else tiny_base(name)


@cache
def quantised_base_of(name: str, form: Quantisation) -> Base:
    return tiny_base(name, quantise=form)


@cache
def dequantised_base_of(name: str, form: Quantisation) -> Base:
    """A base of floats that has the weights a quantised one stands for: whatever it answers, the quantised one must too."""
    base = tiny_base(name)
    weights = quantised_base_of(name, form).parameters()
    with torch.no_grad():
        for key, parameter in base.parameters().items():
            parameter.copy_(weights[key])
    return base


@cache
def stock_of(name: str) -> PreTrainedModel:
    """The same weights in a model of transformers that has never heard of packing."""
    return stock(base_of(name))


def stock(base: Base) -> PreTrainedModel:
    model = copy.deepcopy(base.model)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), StandIn | Head):
            del module.forward
    model.set_attn_implementation("eager")
    return model


def stock_logits(model: PreTrainedModel, row: Sequence[int], prompt_PD: Tensor | None = None) -> Tensor:
    """(n, V) of one row alone; with virtual tokens in front, as anybody would prepend them."""
    ids = torch.tensor([list(row)])
    if prompt_PD is None:
        return model(input_ids=ids, use_cache=False).logits[0]
    embedded = torch.cat([prompt_PD[None], model.get_input_embeddings()(ids)], dim=1)
    return model(inputs_embeds=embedded, use_cache=False).logits[0, prompt_PD.shape[0] :]


def logits_beside(
    model: PreTrainedModel,
    text: Sequence[int],
    answer: Sequence[int],
    front_PD: Tensor | None = None,
    behind_PD: Tensor | None = None,
) -> Tensor:
    """(1 + n, V) of what follows a text, and of the n tokens of an answer: the row alone, its virtual tokens written between
    the embeddings of its words."""
    text_ND, answer_ND = (
        model.get_input_embeddings()(torch.tensor(list(ids), dtype=torch.long)) for ids in (text, answer)
    )
    parts = [front_PD, text_ND, behind_PD, answer_ND]
    inputs = torch.cat([part for part in parts if part is not None])
    return model(inputs_embeds=inputs[None], use_cache=False).logits[0, -1 - len(answer) :]


def logits_behind_keys(
    model: PreTrainedModel, text: Sequence[int], answer: Sequence[int], layers_n2PKd: Tensor, cues_CD: Tensor
) -> Tensor:
    """(1 + n, V) as above, of a model without windows: the text goes first, and what follows it (cues, then the answer) finds
    given keys and values beside the text's own in transformers' cache. They take P positions behind the text."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.tensor([list(text)]), past_key_values=cache, use_cache=True)
    for layer, (keys, values) in zip(cache.layers, layers_n2PKd.transpose(-2, -3), strict=True):
        layer.keys = torch.cat([layer.keys, keys[None]], -2)
        layer.values = torch.cat([layer.values, values[None]], -2)
    answer_ND = model.get_input_embeddings()(torch.tensor(list(answer), dtype=torch.long))
    inputs = torch.cat([cues_CD, answer_ND])
    positions = len(text) + layers_n2PKd.shape[2] + torch.arange(len(inputs))
    output = model(inputs_embeds=inputs[None], past_key_values=cache, position_ids=positions[None])
    return output.logits[0, -1 - len(answer) :]


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random rows of token ids, special ids left out."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]


def packed_logits(base: Base, rows: Sequence[Sequence[int]], slots: tuple[int, ...] | None = None) -> list[Tensor]:
    """Not an oracle but what is checked: all positions of rows that go through a base end to end, row by row."""
    spans, at = [], 0
    for row in rows:
        spans.append(Span(at, len(row)))
        at += len(row)
    batch = Batch(torch.tensor([i for row in rows for i in row]), tuple(spans), None, slots)
    return list(base.logits(batch, torch.arange(at)).split([len(row) for row in rows]))


@torch.no_grad()
def stock_log_likelihood(
    model: PreTrainedModel, context: Sequence[int], answer: Sequence[int], prompt_PD: Tensor | None = None
) -> float:
    """Sum of the log-probabilities of an answer's tokens behind a context, from the whole row."""
    row = [*context, *answer]
    logits = stock_logits(model, row, prompt_PD).double()
    total = 0.0
    for i, token in enumerate(answer):
        at = len(context) + i - 1
        total += float(torch.log_softmax(logits[at], dim=-1)[token])
    return total


def positions(spans: Sequence[Span]) -> list[int]:
    """Position of every packed token: it counts on from the end of the span's last parent."""
    return [sum(spans[p].length for p in span.parents) + i for span in spans for i in range(span.length)]


def visible(spans: Sequence[Span], window: int | None = None) -> list[set[int]]:
    """Which packed tokens each packed token may see: its own span up to itself, and all of the span's parents, where tokens
    stand one after the other as a row has them."""
    seen = []
    for span in spans:
        before = [m for p in span.parents for m in range(spans[p].start, spans[p].start + spans[p].length)]
        for n in range(span.length):
            row = [*before, *range(span.start, span.start + n + 1)]
            seen.append(set(row if window is None else row[-window:]))
    return seen


def attention(
    q_NHd: Tensor,
    k_NKd: Tensor,
    v_NKd: Tensor,
    seen: Sequence[set[int]],
    *,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """(N, H, d): one query at a time, every query head beside its own copy of a key head."""
    group = q_NHd.shape[1] // k_NKd.shape[1]
    rows = []
    for q_Hd, keys in zip(q_NHd, seen, strict=True):
        k_SHd, v_SHd = (t[sorted(keys)].repeat_interleave(group, dim=1) for t in (k_NKd, v_NKd))
        score_SH = scale * (k_SHd * q_Hd).sum(-1)
        if softcap is not None:
            score_SH = softcap * torch.tanh(score_SH / softcap)
        weight_SH = torch.exp(score_SH - score_SH.amax(0))
        rows.append((weight_SH[..., None] * v_SHd).sum(0) / weight_SH.sum(0)[:, None])
    return torch.stack(rows)


def bottleneck(u: Tensor, tensors: Mapping[str, Tensor], nonlinearity: str, scaling: float | Tensor) -> Tensor:
    """s (W_up f(W_down u + b_down) + b_up), written out number by number where torch has a function for it."""
    h = u @ tensors["down.weight"].T + tensors["down.bias"]
    f = {
        "relu": lambda t: t * (t > 0),
        "swish": lambda t: t / (1 + torch.exp(-t)),
        "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / math.sqrt(2))),
        "tanh": lambda t: (torch.exp(2 * t) - 1) / (torch.exp(2 * t) + 1),
    }[nonlinearity]
    return scaling * (f(h) @ tensors["up.weight"].T + tensors["up.bias"])


class PromptNet(nn.Module):
    """A prompt encoder: an LSTM over all rows or none, then layers row by row."""

    def __init__(self, lstm: tuple[int, int] | None, *layers: nn.Module) -> None:
        """`lstm`: its input width, and its width each way."""
        super().__init__()
        self.lstm = None if lstm is None else nn.LSTM(*lstm, num_layers=2, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(*layers)

    def forward(self, table_PD: Tensor) -> Tensor:
        hidden = table_PD if self.lstm is None else self.lstm(table_PD[None])[0][0]
        prompt_PD: Tensor = self.mlp(hidden)
        return prompt_PD


def _peft_lstm(D: int, H: int) -> PromptNet:
    return PromptNet((D, H), nn.Linear(2 * H, 2 * H), nn.ReLU(), nn.Linear(2 * H, D))


#: each net as its origin writes it down, by embedding width D and inner width H
PROMPT_NETS: Mapping[tuple[str, str], Callable[[int, int], PromptNet]] = {
    ("peft", "mlp"): lambda D, H: PromptNet(
        None, nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D)
    ),
    ("peft", "lstm"): _peft_lstm,
    ("nemo", "mlp"): lambda D, H: PromptNet(None, nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)),
    ("nemo", "lstm"): _peft_lstm,
    ("thudm-lama", "lstm"): lambda D, _: PromptNet((D, D // 2), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)),
    ("thudm-fewshot", "lstm"): lambda D, _: PromptNet((D, D), nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, D)),
    ("thudm-fewshot", "mlp"): lambda D, _: PromptNet(None, nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)),
}
