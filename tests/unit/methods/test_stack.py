"""Stacks against a stock model whose weights were changed by hand, part after part; and what cannot be stacked."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tritune as tt
from tests.oracles import base_of, packed_logits, rows_of, stock_logits, stock_of
from tests.unit.exchange.conftest import adapted, task
from tests.unit.test_adapt import BASE, QUICK, task_of
from tritune.adaptation import Adaptation
from tritune.comparison import Plan
from tritune.composition.stacking import stack
from tritune.errors import BadSettings, Mismatch, NotMergeable
from tritune.methods import METHODS
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.full import Full
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.methods.ptuning import PTuning
from tritune.methods.stack import METHOD, Stack, StackDelta
from tritune.models.base import NoEdits, Role
from tritune.models.tiny import tiny_base
from tritune.recipes.settings import CompareSettings
from tritune.tasks.base import Split
from tritune.trial import Trial

TINY = "llama-tied"
ROWS = rows_of((7, 1, 12))
CLOSE = {"rtol": 1e-4, "atol": 5e-5}
WIDE = LoRA(rank=3, alpha=6.0)
NARROW = LoRA(rank=2, alpha=1.0, rank_stabilised=True, roles=(Role.ATTN_Q, Role.MLP_DOWN))
SCALES = IA3(output_roles=(Role.ATTN_V, Role.MLP_UP), input_roles=(Role.ATTN_O, Role.MLP_DOWN))


@torch.no_grad()
def answers(adaptation: Adaptation) -> list[Tensor]:
    with adaptation.base.bind(adaptation.delta):
        return packed_logits(adaptation.base, ROWS)


def merged_by_hand(*parts: Adaptation) -> PreTrainedModel:
    """A stock Llama with the terms and scales of each part put into the weights in turn."""
    model = copy.deepcopy(stock_of(TINY))
    for part in parts:
        tensors = part.delta.export()
        for site in part.delta.sites():
            weight = model.get_parameter(part.base.weight_of(site)[0])
            with torch.no_grad():
                if isinstance(part.config, LoRA):
                    weight += part.config.scale_at(site) * tensors[f"{site.key}.B"] @ tensors[f"{site.key}.A"]
                else:
                    weight *= tensors.get(f"{site.key}.out", torch.ones(site.d_out))[:, None]
                    weight *= tensors.get(f"{site.key}.in", torch.ones(site.d_in))
    return model


@torch.no_grad()
def assert_answers_as(stacked: Adaptation, model: PreTrainedModel, prompt_PD: Tensor | None = None) -> None:
    for row, got in zip(ROWS, answers(stacked), strict=True):
        torch.testing.assert_close(got, stock_logits(model, row, prompt_PD), **CLOSE)
        assert not torch.allclose(got, stock_logits(stock_of(TINY), row), atol=1e-2)


def different(config: LoRA) -> Adaptation:
    """Other numbers than `adapted` gives."""
    found = adapted(base_of(TINY), config)
    tensors = {name: t.flip(0) for name, t in found.delta.export().items()}
    return Adaptation(found.base, found.task, config, tensors, found.origin)


def test_lora_upon_lora_is_the_sum_of_both_in_any_order() -> None:
    one, two = adapted(base_of(TINY), WIDE), different(NARROW)
    model = merged_by_hand(one, two)
    assert_answers_as(stack([one, two]), model)
    assert_answers_as(stack([two, one]), model)


def test_scales_act_on_a_lora_in_front_of_them_and_not_on_one_behind() -> None:
    lora, scales = adapted(base_of(TINY), WIDE), adapted(base_of(TINY), SCALES, size=0.5)
    assert_answers_as(stack([lora, scales]), merged_by_hand(lora, scales))
    assert_answers_as(stack([scales, lora]), merged_by_hand(scales, lora))
    one, other = answers(stack([lora, scales])), answers(stack([scales, lora]))
    assert not torch.allclose(one[0], other[0], atol=1e-3)


def test_three_parts_stand_inside_each_other_in_their_order() -> None:
    inner, lora, outer = (
        adapted(base_of(TINY), SCALES, size=0.5), adapted(base_of(TINY), WIDE), adapted(base_of(TINY), SCALES, size=0.3),
    )  # fmt: skip
    assert_answers_as(stack([inner, lora, outer]), merged_by_hand(inner, lora, outer))


def test_a_prompt_goes_through_the_base_with_the_other_parts() -> None:
    prompt, lora = adapted(base_of(TINY), PTuning(tokens=3, encoder="none")), adapted(base_of(TINY), WIDE)
    wanted = merged_by_hand(lora), prompt.delta.export()["prompt"]
    assert_answers_as(stack([prompt, lora]), *wanted)
    assert_answers_as(stack([lora, prompt]), *wanted)


@pytest.mark.parametrize("config", [WIDE, SCALES, Bottleneck(), PTuning(tokens=2, encoder="none"), Prefix(tokens=2)])
def test_a_stack_of_one_is_that_one(config: tt.LoRA) -> None:
    alone = adapted(base_of(TINY), config)
    for got, wanted in zip(answers(stack([alone])), answers(alone), strict=True):
        assert torch.equal(got, wanted)


def test_a_bottleneck_reads_what_the_one_before_it_left() -> None:
    base = base_of(TINY)
    first, second = adapted(base, Bottleneck(reduction_factor=4.0)), adapted(base, Bottleneck(placement="double_seq"))

    class ByHand(NoEdits):
        def sites(self):  # type: ignore[no-untyped-def]
            return second.delta.sites()

        def edit(self, site, x_ND, y_NE, slot_N):  # type: ignore[no-untyped-def]
            at_first = {own.key for own in first.delta.sites()}
            y_NE = first.delta.edit(site, x_ND, y_NE, None) if site.key in at_first else y_NE
            return second.delta.edit(site, x_ND, y_NE, None)

    with torch.no_grad(), base.bind(ByHand()):
        wanted = packed_logits(base, ROWS)
    for got, want in zip(answers(stack([first, second])), wanted, strict=True):
        torch.testing.assert_close(got, want, **CLOSE)
    assert not torch.allclose(answers(stack([second, first]))[0], wanted[0], atol=1e-3)


# --- stored, loaded, taken apart ---


def test_what_is_stacked_is_stored_and_loaded_like_any_other(tmp_path: Path) -> None:
    parts = [adapted(base_of(TINY), PTuning(tokens=3, encoder="none")), adapted(base_of(TINY), WIDE)]
    stacked = stack(parts)
    stored = stacked.save(tmp_path / "both")
    assert (stored.manifest.method, stored.manifest.made and stored.manifest.made["how"]) == ("stack", "stacked")
    loaded = tt.load(tmp_path / "both", base=base_of(TINY))
    assert loaded.predict(["good", "bad"]) == stacked.predict(["good", "bad"]) != parts[0].predict(["good", "bad"])
    assert loaded.origin == stacked.origin
    assert loaded.save_below(tmp_path).id == stored.id
    with pytest.raises(Mismatch, match="weights of the base"):
        tt.load(tmp_path / "both", base=tiny_base(TINY, seed=1))


def test_a_stack_in_a_stack_stands_for_its_parts() -> None:
    one, two, three = adapted(base_of(TINY), WIDE), adapted(base_of(TINY), SCALES), different(NARROW)
    nested = stack([stack([one, two]), three])
    assert nested.config == Stack.of([WIDE, SCALES, NARROW])
    for got, wanted in zip(answers(nested), answers(stack([one, two, three])), strict=True):
        assert torch.equal(got, wanted)


def test_the_document_is_plain_and_read_strictly() -> None:
    config = Stack.of([PTuning(tokens=4), LoRA(rank=2, ranks={Role.ATTN_V: 1})])
    document = json.loads(config.model_dump_json())
    assert [part["method"] for part in document["parts"]] == ["ptuning", "lora"]
    assert Stack.read(document, "here") == config == Stack(parts=[PTuning(tokens=4), document["parts"][1]])
    short = {"parts": [{"method": "ptuning"}, {"method": "lora", "config": {"rank": 2}}]}
    assert Stack.read(short, "here") == Stack.of([PTuning(), LoRA(rank=2)])
    wrong = {"parts": [{"method": "lora", "config": {"rnak": 2}}, {"method": "loar"}, {"config": {}}]}
    with pytest.raises(Mismatch) as caught:
        Stack.read(wrong, "here")
    assert all(said in str(caught.value) for said in ("rnak", "parts.1", "parts.2"))


# --- trained together ---


def test_a_prompt_and_a_lora_train_together_each_at_its_own_rate() -> None:
    config = Stack(parts=[PTuning(tokens=4), LoRA(rank=2)])
    trial = Trial(base_of(BASE), task_of(), config, QUICK, METHOD.learning_rate, 0)
    assert isinstance(trial.delta, StackDelta)
    factors = trial.delta.rate_factors()
    assert set(factors) == set(trial.delta.trainable())
    assert {factor for name, factor in factors.items() if name.startswith("parts.0.")} == {2.0}
    assert {factor for name, factor in factors.items() if name.startswith("parts.1.")} == {1.0}


def test_it_learns_and_serves_what_it_learned(tmp_path: Path) -> None:
    training = QUICK.model_copy(update={"epochs": 12.0, "learning_rate": 1e-2, "evaluations": 3})
    found = tt.adapt(
        base_of(BASE), task_of(), method=tt.Stack(parts=[tt.PTuning(tokens=4), tt.LoRA(rank=8)]), training=training
    )
    assert found.evaluate(split=Split.DEV).score >= 0.8
    assert set(found.delta.export()) >= {"parts.0.prompt", "parts.1.layers.0.attn.q.A"}
    found.save(tmp_path / "mine")
    assert tt.load(tmp_path / "mine", base=base_of(BASE)).predict(["ab+12"]) == found.predict(["ab+12"])


def test_all_methods_to_compare_are_those_of_one_part() -> None:
    assert CompareSettings().kinds() == tuple(METHODS) == Plan().methods
    named = CompareSettings(methods=("stack", "lora"))
    assert named.kinds() == ("stack", "lora")


# --- what cannot be stacked ---


def test_every_reason_is_told_at_once() -> None:
    base = base_of(TINY)
    parts = [
        adapted(base, PTuning(tokens=2, encoder="none")), adapted(base, Prefix(tokens=2)),
        adapted(base, Full(parts=("norms",))), adapted(base, WIDE),
    ]  # fmt: skip
    there = adapted(tiny_base(TINY, seed=1), WIDE)
    there.task = tt.classification(test=[{"text": "a", "label": "up"}, {"text": "b", "label": "down"}])
    with pytest.raises(Mismatch) as caught:
        stack([*parts, there])
    found = {problem.where: problem.what for problem in caught.value.problems}
    assert "replaces weights of the base" in found["part 3 (full)"]
    assert "2 parts have virtual tokens" in found["in front of the text"]
    assert "part 5, weights of the base" in found
    assert "part 5, task, labels" in found
    assert "--task-of" in str(caught.value)


def test_a_task_that_is_named_settles_whose_it_is() -> None:
    one, two = adapted(base_of(TINY), WIDE), different(NARROW)
    two.task = tt.classification(test=[{"text": "a", "label": "up"}, {"text": "b", "label": "down"}])
    with pytest.raises(Mismatch, match="label_words"):
        stack([one, two])
    assert stack([one, two], task=two.task).task.answers == ("down", "up")


def test_two_prompts_are_fine_where_they_do_not_meet() -> None:
    behind = PTuning(tokens=2, encoder="none", placement="suffix")
    Stack.of([Prefix(tokens=2), behind, WIDE])
    for pair in ([behind, behind], [Prefix(), PTuning(placement="around", front=3)], [PTuning(), PTuning()]):
        with pytest.raises(BadSettings, match="next to the text"):
            Stack.of(pair)


def test_what_is_computed_from_the_weights_stands_first() -> None:
    dora = LoRA(rank=2, dora=True)
    Stack.of([PTuning(), dora, SCALES, NARROW])
    for configs in ([NARROW, dora], [PTuning(), SCALES, dora], [dora, dora]):
        with pytest.raises(BadSettings, match="own weights"):
            Stack.of(configs)


def test_merging_names_every_part_that_cannot_be() -> None:
    parts = [adapted(base_of(TINY), c) for c in (PTuning(tokens=2, encoder="none"), WIDE, Bottleneck())]
    stacked = stack(parts, task=task())
    with pytest.raises(NotMergeable) as caught:
        METHOD.merge(stacked.delta, stacked.base)
    assert all(said in str(caught.value) for said in ("part 1 (ptuning)", "part 3 (bottleneck)"))
