"""Layers in two parts: what the lower ones give is kept, and training and scoring are what they are without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles import base_of, packed_logits, quantised_base_of, rows_of, stock_of
from tests.unit.methods.test_placement import moved, rows
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.methods import method_of
from tritune.methods.base import Bank, Delta
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.full import Full
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.methods.stack import Stack
from tritune.models import texts as texts_module
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.models.probe import parts_are_whole
from tritune.models.texts import Texts
from tritune.models.tiny import CONFIGS, tiny_base
from tritune.run import Training
from tritune.spec import MethodConfig, Quantisation
from tritune.text.encode import Encoded
from tritune.text.pack import WORTH_SHARING, training_batch
from tritune.train.loop import Event, Measured, batch_loss, train
from tritune.train.state import TrainState
from tritune.train.together import train_together
from tritune.train.trainer import Job

#: windows, soft caps and scaled embeddings; learned positions; norms behind the sum and embeddings of another width
BASES = ("llama", "gemma2", "gemma3", "gpt2", "opt-post-norm")
TOP: dict[str, MethodConfig] = {
    "lora": LoRA(rank=2, top_layers=1),
    "lora-two": LoRA(rank=2, top_layers=2),
    "lora-head": LoRA(rank=2, roles=(Role.HEAD,)),
    "ia3": IA3(output_roles=(Role.ATTN_K, Role.ATTN_V), input_roles=(), top_layers=2),
    "bottleneck": Bottleneck(reduction_factor=8.0, top_layers=1),
    "stack": Stack.of([LoRA(rank=2, top_layers=1), Bottleneck(leave_out=(0,))]),
}
#: sums of products in another order, through so many steps
TRAINED = {"rtol": 2e-3, "atol": 2e-5}

each_base = pytest.mark.parametrize("name", BASES)


def known(given: Sequence[Encoded]) -> Texts:
    return {row.context: [choice[:-1] for choice in row.choices] for row in given}


@contextmanager
def counted(base: Base, layer: int) -> Iterator[list[int]]:
    """How many tokens go through a layer, pass by pass: what its attention is given."""
    seen: list[int] = []
    place = next(p for p in base.places if p.site.layer == layer and p.site.role is Role.BLOCK_ATTN)
    handle = place.entry.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[-2]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def proved(base: Base, first: int) -> None:
    """Let a base prove that it can be divided here, which it does once, so that nobody counts the tokens of that."""
    site = next(site for site in base.sites if site.layer == first)
    with base.remembering({}), base.bind(moved(LoRA(rank=1, roles=(site.role,), top_layers=3 - first), base)):
        pass


# --- the parts ---


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_lower_layers_give_is_what_transformers_says(name: str) -> None:
    base, given = base_of(name), rows()
    batch = training_batch(given)
    for first in (1, 2):
        states = base.states(batch, first)
        for row, span in zip(given, batch.spans, strict=True):
            ids = torch.tensor([(*row.context, *row.target[:-1])])
            wanted = stock_of(name)(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[first][0]
            got = states[span.start : span.start + span.length]
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_are_the_whole_and_nothing_stays(name: str) -> None:
    base, given = base_of(name), rows_of((9, 1, 14))
    before = packed_logits(base, given)
    assert all(parts_are_whole(base, first) for first in (1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(packed_logits(base, given), before, strict=True))


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_quantised_base_divides_too(form: Quantisation) -> None:
    assert all(parts_are_whole(quantised_base_of("llama", form), first) for first in (1, 2, 3))


@pytest.mark.parametrize("name", BASES)
def test_in_bf16_kept_states_are_the_bits_that_the_layer_gets(name: str) -> None:
    base = tiny_base(name, dtype=torch.bfloat16)
    assert all(parts_are_whole(base, first) for first in (1, 2, 3))


@pytest.fixture
def looking_back() -> Base:
    """The last layer adds what the first one gave: token by token, so rows may be packed."""
    base, gave = tiny_base("llama"), {}
    layers = base.model.model.layers
    layers[0].register_forward_hook(lambda _, __, output: gave.update(first=output))
    layers[2].register_forward_hook(lambda _, __, output: output + 0.1 * gave["first"])
    return base


def test_a_base_whose_parts_are_not_the_whole_runs_whole(looking_back: Base) -> None:
    assert not any(parts_are_whole(looking_back, first) for first in (2, 3))
    given, delta = rows(), moved(TOP["lora"], looking_back)
    with looking_back.bind(delta), torch.no_grad():
        wanted = batch_loss(looking_back, training_batch(given))
    with looking_back.remembering(known(given)), looking_back.bind(delta), torch.no_grad():
        for _ in range(2):
            assert torch.equal(batch_loss(looking_back, training_batch(given)), wanted)


# --- losses, scores and gradients ---


def answers(base: Base, delta: Delta, given: Sequence[Encoded]) -> tuple[float, list[tuple[float, ...]], list[Tensor]]:
    """A loss, its gradients and all scores, under what is bound."""
    delta.zero_grad()
    loss = batch_loss(base, training_batch(given))
    loss.backward()
    gradients = [p.grad for p in delta.parameters() if p.grad is not None]
    return float(loss.detach()), choice_log_likelihoods(base, given), gradients


@each_base
@pytest.mark.parametrize("kind", TOP)
@pytest.mark.parametrize("common", [0, WORTH_SHARING])
def test_from_kept_states_all_is_as_without(name: str, kind: str, common: int) -> None:
    base, given = base_of(name), rows(6, common)
    delta = moved(TOP[kind], base)
    with base.bind(delta):
        wanted = answers(base, delta, given)
    with base.remembering(known(given)), base.bind(delta), counted(base, 0) as seen:
        for _ in range(2):
            got = answers(base, delta, given)
            assert got[0] == pytest.approx(wanted[0], rel=1e-5)
            for a, b in zip(got[1], wanted[1], strict=True):
                assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
            for mine, its in zip(got[2], wanted[2], strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4 * float(its.abs().max()))
    own = sum(len(row.context) - common + sum(len(c) - 1 for c in row.choices) for row in given)
    assert sum(seen) == own + 2 * common, (
        "each token once, and what all begin with again to compute what stands behind it"
    )


@pytest.mark.parametrize(("memory", "spilled"), [(0, True), (1 << 30, False)])
def test_what_memory_does_not_hold_lies_in_a_file(
    memory: int, spilled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(texts_module, "GROUP_TOKENS", 20)
    base, given = base_of("llama"), rows(9)
    delta = moved(TOP["lora"], base)
    with base.bind(delta):
        wanted = answers(base, delta, given)
    with base.remembering(known(given), memory=memory), base.bind(delta), counted(base, 0) as seen:
        for _ in range(2):
            assert answers(base, delta, given)[0] == pytest.approx(wanted[0], rel=1e-5)
            once = sum(seen)
        assert sum(seen) == once
        tokens = sum(len(row.context) + sum(len(c) - 1 for c in row.choices) for row in given)
        assert [p.stat().st_size for p in tmp_path.rglob("states")] == ([tokens * 32 * 4] if spilled else [])
    assert not list(tmp_path.iterdir())


def test_rows_that_are_not_known_are_computed() -> None:
    base, given = base_of("gemma3"), rows(8)
    delta = moved(TOP["lora-two"], base)
    with base.bind(delta):
        wanted = answers(base, delta, given)
    with base.remembering(known(given[2:5])), base.bind(delta):
        got = answers(base, delta, given)
    assert got[0] == pytest.approx(wanted[0], rel=1e-5)
    for a, b in zip(got[1], wanted[1], strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_where_no_row_is_known_all_layers_run_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    base, given = base_of("llama"), rows(8)
    delta = moved(TOP["lora"], base)
    with base.bind(delta):
        wanted = answers(base, delta, given[4:])
    for texts in ({}, known(given[:4])):
        with base.remembering(texts), base.bind(delta), monkeypatch.context() as patch:
            patch.setattr(base, "states", None)
            got = answers(base, delta, given[4:])
        assert got[:2] == wanted[:2]


# --- where nothing is kept ---

FROM_BELOW: Mapping[str, MethodConfig] = {
    "all layers": LoRA(rank=2),
    "the embedding": LoRA(rank=2, roles=(Role.EMBED, Role.HEAD)),
    "a prompt in front": Stack.of([PTuning(tokens=2, hidden=4), LoRA(rank=2, top_layers=1)]),
    "a prompt behind": Stack.of([PTuning(tokens=2, hidden=4, placement="suffix"), LoRA(rank=2, top_layers=1)]),
    "weights": Full(top_layers=1),
}


@pytest.mark.parametrize("kind", FROM_BELOW)
def test_what_is_learned_from_below_sees_no_kept_states(kind: str) -> None:
    base, given = base_of("llama"), rows(5)
    delta = moved(FROM_BELOW[kind], base)
    with base.bind(delta):
        wanted = answers(base, delta, given)
    with base.remembering(known(given)):
        with base.bind(moved(TOP["lora"], base)):  # another's states are there
            choice_log_likelihoods(base, given)
        with base.bind(delta):
            got = answers(base, delta, given)
    assert got[:2] == wanted[:2]
    assert all(torch.equal(a, b) for a, b in zip(got[2], wanted[2], strict=True))


@pytest.mark.parametrize("order", [("lora", "lora-two"), ("lora-two", "lora")])
def test_states_from_further_down_serve_what_acts_further_up(order: tuple[str, str]) -> None:
    base, given = base_of("gpt2"), rows(5)
    with base.remembering(known(given)):
        for kind in (*order, *order):
            delta = moved(TOP[kind], base)
            with base.bind(delta):
                got = choice_log_likelihoods(base, given)
            with_nothing = without(base, delta, given)
            for a, b in zip(got, with_nothing, strict=True):
                assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
        assert base._states is not None
        assert base._states.first == 1


def without(base: Base, delta: Delta, given: Sequence[Encoded]) -> list[tuple[float, ...]]:
    """Scores of a base that remembers nothing: another one of the same weights."""
    other = tiny_base(base.name.removeprefix("tiny-"))
    with other.bind(delta):
        return choice_log_likelihoods(other, given)


def test_adaptations_of_several_depths_share_a_batch() -> None:
    base, given = base_of("gpt2"), rows(6)
    bank = Bank(
        {0: moved(TOP["lora"], base), 1: moved(TOP["bottleneck"], base, 3), 2: moved(TOP["lora-head"], base, 5)}
    )
    slots = [0, 1, 2, 2, 1, 0]
    with base.bind(bank):
        wanted = choice_log_likelihoods(base, given, slots=slots)
    with base.remembering(known(given)), base.bind(bank), counted(base, 1) as seen:
        for _ in range(3):
            got = choice_log_likelihoods(base, given, slots=slots)
            for a, b in zip(got, wanted, strict=True):
                assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert len(seen) == 1


# --- training ---

PASSES = Training(epochs=3.0, batch_tokens=40, evaluations=3, warmup=0.0)


class Run:
    """A short run on rows, with dev among what is trained on."""

    def __init__(self, base: Base, config: MethodConfig, given: Sequence[Encoded]) -> None:
        self.base, self.given = base, given
        self.delta = method_of(config).init(config, base, torch.Generator().manual_seed(0))
        self.states: list[TrainState] = []

    def evaluate(self) -> Measured:
        scores = choice_log_likelihoods(self.base, self.given)
        return Measured(0.0, -sum(score[row.gold or 0] for score, row in zip(scores, self.given, strict=True)))

    def go(self, *, remember: bool, memory: int = 1 << 30, **options: Any) -> list[Event]:
        with self.base.remembering(known(self.given) if remember else {}, memory=memory):
            events = train(
                PASSES, self.base, self.delta, self.given, learning_rate=1e-2, seed=5,
                evaluate=self.evaluate, save=lambda state: self.states.append(state.kept()), **options,
            )  # fmt: skip
            return list(events)


def losses(events: Sequence[Event]) -> list[float]:
    each = [(e.point.train_loss, e.point.dev_loss) for e in events if e.kind in ("step", "evaluation")]
    return [loss for pair in each for loss in pair if loss is not None]


@each_base
@pytest.mark.parametrize("config", [LoRA(rank=2, top_layers=1, dropout=0.2), TOP["ia3"], TOP["bottleneck"]])
def test_training_from_kept_states_is_training(name: str, config: MethodConfig) -> None:
    base, given = base_of(name), rows(8)
    with counted(base, 0) as plain_tokens:
        plain = Run(base, config, given)
        wanted = plain.go(remember=False)
    for memory in (1 << 30, 0):
        kept = Run(base, config, given)
        with counted(base, 0) as tokens:
            events = kept.go(remember=True, memory=memory)
        assert sum(tokens) < sum(plain_tokens) / 3
        assert [(e.kind, e.step) for e in events] == [(e.kind, e.step) for e in wanted]
        assert losses(events) == pytest.approx(losses(wanted), rel=1e-4)
        for key, tensor in plain.delta.export().items():
            torch.testing.assert_close(kept.delta.export()[key], tensor, **TRAINED)


@pytest.mark.parametrize("memory", [1 << 30, 20 * 32 * 4, 0])
def test_a_run_that_goes_on_equals_one_that_was_never_stopped(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "GROUP_TOKENS", 20)
    base, given, config = base_of("gemma2"), rows(8), LoRA(rank=2, top_layers=1, dropout=0.2)
    straight, begun, goes_on = (Run(base, config, given) for _ in range(3))
    straight.go(remember=True, memory=memory)
    begun.go(remember=True, memory=memory, until=4)
    goes_on.go(remember=True, memory=memory, resume=begun.states[-1])
    wanted = straight.delta.export()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in goes_on.delta.export().items())


def test_runs_that_are_trained_at_once_share_what_is_kept() -> None:
    base, given = base_of("llama"), rows(8)
    configs = (TOP["lora"], TOP["lora-two"], LoRA(rank=3, top_layers=2, dropout=0.2))
    apart = [Run(base, config, given) for config in configs]
    for run in apart:
        run.go(remember=False)
    at_once = [Run(base, config, given) for config in configs]
    jobs = [Job(PASSES, r.delta, given, 1e-2, 5, r.evaluate, r.states.append) for r in at_once]
    proved(base, 1)
    with base.remembering(known(given)), counted(base, 0) as tokens:
        assert all(isinstance(event, Event) for _, event in train_together(base, jobs))
    assert sum(tokens) == sum(len(row.context) + sum(len(c) - 1 for c in row.choices) for row in given)
    for one, other in zip(at_once, apart, strict=True):
        for key, tensor in other.delta.export().items():
            torch.testing.assert_close(one.delta.export()[key], tensor, **TRAINED)
