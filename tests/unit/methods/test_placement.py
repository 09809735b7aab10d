"""P-tuning's placements: rows with virtual tokens behind or around their text, against stock transformers row by row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of, logits_beside, stock_of
from tritune.errors import BadSettings
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.methods import method_of
from tritune.methods.base import Bank, Delta
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.base import BARE, IGNORE, NoEdits
from tritune.models.pretrained import Base
from tritune.models.tiny import CONFIGS
from tritune.spec import MethodConfig
from tritune.text.encode import Encoded
from tritune.text.pack import WORTH_SHARING, training_batch
from tritune.train.loop import batch_loss

PLACED = {
    "prefix": PTuning(tokens=4, hidden=6),
    "suffix": PTuning(tokens=3, hidden=6, placement="suffix"),
    "around": PTuning(tokens=5, hidden=6, placement="around", front=2),
}
CHOICES = ((7,), (8, 9), (11, 12, 13))

each_base = pytest.mark.parametrize("name", CONFIGS)


def rows(n: int = 7, common: int = 0) -> list[Encoded]:
    """Contexts shorter and longer than every window, answers of one and of several tokens."""
    generator = torch.Generator().manual_seed(4)
    shared = torch.randint(14, 250, (common,), generator=generator).tolist()
    found = []
    for i in range(n):
        own = torch.randint(14, 250, (1 + (5 * i) % 17,), generator=generator).tolist()
        found.append(Encoded(str(i), (*shared, *own), CHOICES[i % 3], CHOICES, i % 3))
    return found


def moved(config: MethodConfig, base: Base, seed: int = 0) -> Delta:
    delta = method_of(config).init(config, base, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return delta.eval()


def written_out(name: str, row: Encoded, answer: Sequence[int], front: Tensor, behind: Tensor) -> Tensor:
    """Log-probability of an answer, row by row."""
    logits = logits_beside(stock_of(name), row.context, answer[:-1], front, behind)
    return torch.log_softmax(logits, -1)[range(len(answer)), list(answer)].sum()


def parts(config: PTuning, prompt: Tensor) -> tuple[Tensor, Tensor]:
    n = {"prefix": config.tokens, "suffix": 0, "around": config.front or 0}[config.placement]
    return prompt[:n], prompt[n:]


@each_base
@pytest.mark.parametrize("placement", PLACED)
def test_loss_and_gradients_are_those_of_rows_written_out(name: str, placement: str) -> None:
    """Also where the common beginning is shared, and where the text went through the base without gradients."""
    base, config = base_of(name), PLACED[placement]
    delta = moved(config, base)
    for common in (0, WORTH_SHARING):
        given = rows(common=common)
        prompt = delta.export()["prompt"].requires_grad_(True)
        wanted = -torch.stack([written_out(name, row, row.target, *parts(config, prompt)) for row in given]).sum()
        (gradient,) = torch.autograd.grad(wanted, prompt)
        plain = method_of(config).load(config, base, {"prompt": prompt.detach().clone()})
        with base.bind(plain):
            loss = batch_loss(base, training_batch(given))
            loss.backward()
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
        (got,) = (p.grad for p in plain.trainable().values())
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@each_base
@pytest.mark.parametrize("placement", PLACED)
@torch.no_grad()
def test_every_answer_is_scored_behind_the_same_virtual_tokens(name: str, placement: str) -> None:
    base, config = base_of(name), PLACED[placement]
    delta = moved(config, base)
    given = rows(common=WORTH_SHARING)
    with base.bind(delta):
        got = choice_log_likelihoods(base, given)
    for row, scores in zip(given, got, strict=True):
        wanted = [float(written_out(name, row, c, *parts(config, delta.export()["prompt"]))) for c in row.choices]
        assert scores == pytest.approx(wanted, rel=1e-4, abs=2e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_bank_of_all_placements_answers_each_row_as_alone(name: str) -> None:
    """Different numbers of virtual tokens in different places, other methods and bare rows in one batch."""
    base = base_of(name)
    deltas: dict[int, Delta] = {i: moved(config, base, i) for i, config in enumerate(PLACED.values())}
    deltas[3] = moved(LoRA(rank=2), base, 3)
    given = rows(8)
    alone = {}
    for slot, edits in {**deltas, BARE: NoEdits()}.items():
        with base.bind(edits):
            alone[slot] = choice_log_likelihoods(base, given)
    slots = [0, 1, 2, 3, BARE, 2, 1, 0]
    with base.bind(Bank(deltas)):
        got = choice_log_likelihoods(base, given, slots=slots)
    for i, slot in enumerate(slots):
        assert got[i] == pytest.approx(alone[slot][i], rel=1e-4, abs=2e-4)
    for a, b in itertools.combinations(alone.values(), 2):  # or the law would hold for code that does nothing
        assert max(abs(x - y) for x, y in zip(a[0], b[0], strict=True)) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_text_ahead_of_what_is_learned_changes_no_number(name: str) -> None:
    """The fast path against its twin: the same loss and gradients in one pass, which asking inside a text brings about."""
    base, config = base_of(name), PLACED["suffix"]
    batch = training_batch(rows(common=WORTH_SHARING))
    assert batch.labels_N is not None
    at_K = (batch.labels_N != IGNORE).nonzero()[:, 0]
    results = []
    for also in ([], [0]):
        delta = moved(config, base)
        with base.bind(delta):
            logits = base.logits(batch, torch.cat([at_K, torch.tensor(also, dtype=torch.long)]))[: len(at_K)]
            logits.logsumexp(-1).sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in delta.trainable().items()}))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    for parameter, gradient in results[0][1].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, results[1][1][parameter], rtol=1e-4, atol=1e-5)


def test_a_text_goes_through_the_base_without_gradients() -> None:
    """Only virtual tokens and what stands behind them are differentiated through; scoring is one pass as ever."""
    base = base_of("llama")
    seen: list[tuple[int, bool]] = []
    handle = base.model.model.layers[1].mlp.register_forward_hook(
        lambda _, args, y: seen.append((args[0].shape[-2], y.requires_grad))
    )
    given = [Encoded("a", tuple(range(3, 40)), (7, 8)), Encoded("b", (5, 6), (9,))]
    try:
        with base.bind(moved(PLACED["suffix"], base)):
            batch_loss(base, training_batch(given))
            assert seen == [(37 + 2, False), (3 + 1 + 3, True)]
        seen.clear()
        with base.bind(moved(PLACED["around"], base)):
            batch_loss(base, training_batch(given))
            assert seen == [(2 + 37 + 2 + 3 + 1 + 3, True)]
    finally:
        handle.remove()


def test_front_goes_with_around() -> None:
    for bad in ({"front": 2}, {"placement": "around"}, {"placement": "around", "front": 20}):
        with pytest.raises(BadSettings, match="front"):
            PTuning(tokens=20, **bad)  # type: ignore[arg-type]
