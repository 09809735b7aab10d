"""The forgetting probe: what it measures, against stock transformers; and that it sees damage."""

from __future__ import annotations

import re

import pytest
import torch

from tests.oracles import base_of, stock_log_likelihood, stock_of
from tritune.errors import BadData
from tritune.evaluate.forgetting import ForgettingProbe, general_text
from tritune.methods.full import METHOD as FULL
from tritune.methods.full import Full
from tritune.methods.lora import METHOD as LORA
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import METHOD as P_TUNING
from tritune.methods.ptuning import PTuning
from tritune.models.base import NoEdits


def test_the_text_is_small_and_of_two_languages() -> None:
    text = general_text()
    assert set(text) == {"en", "ru"}
    sentences = [said for language in text.values() for said in language]
    assert 40 <= len(sentences) <= 60
    assert len(set(sentences)) == len(sentences)
    assert all(said.endswith(".") and " " in said for said in sentences)
    assert all(re.search("[а-яё]", said) for said in text["ru"])
    assert not any(re.search("[а-яё]", said) for said in text["en"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("prompt", [0, 3])
def test_the_loss_is_the_mean_over_tokens_then_over_languages(name: str, prompt: int) -> None:
    """Sentence by sentence through stock transformers; a byte is a token here."""
    base = base_of(name)
    edits = P_TUNING.init(PTuning(tokens=prompt), base, torch.Generator()) if prompt else NoEdits()
    given = edits.segments()[0].embeddings_PD.detach() if prompt else None
    means = []
    for sentences in general_text().values():
        total, tokens = 0.0, 0
        for said in sentences:
            first, rest = (base.tokenizer(part)["input_ids"] for part in re.split("(?= )", said, maxsplit=1))
            total -= stock_log_likelihood(stock_of(name), first, rest, given)
            tokens += len(rest)
        means.append(total / tokens)
    probe = ForgettingProbe(base, virtual=prompt)
    assert probe.loss(edits) == pytest.approx(sum(means) / 2, rel=1e-5)
    if not prompt:
        assert probe.bare == pytest.approx(sum(means) / 2, rel=1e-5)


def test_what_has_learned_nothing_has_forgotten_nothing() -> None:
    base = base_of("llama")
    probe = ForgettingProbe(base)
    for edits in (NoEdits(), LORA.init(LoRA(), base, torch.Generator()), FULL.init(Full(), base, torch.Generator())):
        assert probe.rise(edits) == pytest.approx(0.0, abs=1e-6)


def test_more_damage_is_more_forgetting() -> None:
    """A model that gives every token the same chance has a loss of log V; pulling the base there is a known rise."""
    base = base_of("llama")
    probe = ForgettingProbe(base)
    delta = FULL.init(Full(parts=("head",)), base, torch.Generator())
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter.zero_()
    assert probe.loss(delta) == pytest.approx(float(torch.log(torch.tensor(300.0))), rel=1e-6)
    assert probe.rise(delta) == pytest.approx(probe.loss(delta) - probe.bare)


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(BadData, match="general text, en, sentence"):
        ForgettingProbe(base_of("llama"), virtual=200)
