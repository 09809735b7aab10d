"""Defects that other packages have had in public, one test each: what must never happen here.

The first line of every test names the thread. The oracle is transformers itself with the row alone, never our own output.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritune as tt
from tests.laws.conftest import training_rows
from tests.oracles import (
    base_of,
    packed_logits,
    quantised_base_of,
    rows_of,
    stock_log_likelihood,
    stock_logits,
    stock_of,
)
from tests.unit.exchange.conftest import adapted, task
from tests.unit.methods.test_placement import PLACED, moved
from tests.unit.methods.test_placement import rows as placed_rows
from tritune.adaptation import Adaptation
from tritune.composition.merging import How, merge
from tritune.errors import Mismatch, NotMergeable
from tritune.evaluate.answer import choice_log_likelihoods
from tritune.exchange.inward import import_folder
from tritune.exchange.peft import CONFIG, FORMAT, TENSORS
from tritune.methods import METHODS, method, method_of
from tritune.methods.base import Bank, Delta
from tritune.methods.lora import LoRA
from tritune.methods.prefix import Prefix
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.run import Training
from tritune.spec import MethodConfig, Quantisation
from tritune.store.files import write_tensors
from tritune.text.pack import training_batch
from tritune.train.loop import Measured, batch_loss, train
from tritune.train.state import TrainState

TINY = "llama-tied"
ROWS = rows_of((9, 2, 14))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
WITH_ENCODER = (PTuning(tokens=3, hidden=8), PTuning(tokens=3, encoder="lstm", hidden=5, start="random"))
ENCODERS = ("mlp", "lstm")
TRAINING = Training(epochs=3.0, batch_tokens=40, evaluations=0, warmup=0.0)


def fresh(config: MethodConfig, base: Base, seed: int = 0) -> Delta:
    return method_of(config).init(config, base, torch.Generator().manual_seed(seed))


def go(delta: Delta, **options: object) -> None:
    list(train(TRAINING, base_of(TINY), delta, training_rows(), learning_rate=1e-2, seed=5, **options))  # type: ignore[arg-type]


# --- prompts ---


@pytest.mark.parametrize("config", WITH_ENCODER, ids=ENCODERS)
def test_p_tuning_resumes_with_its_encoder(config: PTuning) -> None:
    """peft#1247: a P-tuning run could not be resumed; what was saved is the prompt, and the encoder began anew."""
    states: list[TrainState] = []
    straight = fresh(config, base_of(TINY))
    go(straight)
    go(fresh(config, base_of(TINY)), until=4, save=lambda state: states.append(state.kept()))
    saved = states[-1].kept().group("delta")
    encoder = [name for name in saved if name.startswith("encoder.")]
    assert encoder
    resumed = fresh(config, base_of(TINY), seed=77)
    go(resumed, resume=states[-1])
    for name, tensor in straight.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    assert any(not torch.equal(resumed.state()[name], saved[name]) for name in encoder)


@pytest.mark.parametrize("config", WITH_ENCODER, ids=ENCODERS)
def test_a_stored_prompt_answers_as_the_encoder_did(config: PTuning, tmp_path: Path) -> None:
    """peft#2043: a P-tuned model that was saved and loaded answered otherwise than the one in memory."""
    base = base_of(TINY)
    trained = fresh(config, base)
    go(trained)
    trained.eval()
    with torch.no_grad(), base.bind(trained):
        wanted = packed_logits(base, ROWS)
    loaded = method_of(config).load(config, base, trained.export()).eval()
    with torch.no_grad(), base.bind(loaded):
        for got, want in zip(packed_logits(base, ROWS), wanted, strict=True):
            torch.testing.assert_close(got, want, **CLOSE)


def test_a_row_answers_alone_as_in_any_batch() -> None:
    """peft#54, peft#1093: with a prompt in front, padding moved positions, and a batch answered otherwise than its rows."""
    base = base_of(TINY)
    prompt = adapted(base, PTuning(tokens=4, encoder="none"))
    prompt_PD = prompt.delta.export()["prompt"]
    rows = training_rows()
    with base.bind(prompt.delta):
        together = choice_log_likelihoods(base, rows)
        alone = [choice_log_likelihoods(base, [row])[0] for row in rows]
    for row, batched, single in zip(rows, together, alone, strict=True):
        wanted = [stock_log_likelihood(stock_of(TINY), row.context, choice, prompt_PD) for choice in row.choices]
        assert batched == pytest.approx(wanted, abs=1e-3)
        assert single == pytest.approx(wanted, abs=1e-3)


def test_packed_rows_each_see_their_own_prompt() -> None:
    """trl packs rows into one sequence without a guard for prompt methods: only the first row has the prompt in front."""
    base = base_of(TINY)
    deltas = {slot: adapted(base, PTuning(tokens=n, encoder="none")).delta for slot, n in ((0, 3), (1, 5))}
    slots = (1, 0, 1)
    with torch.no_grad(), base.bind(Bank(deltas)):
        packed = packed_logits(base, ROWS, slots)
    with torch.no_grad():
        for row, slot, got in zip(ROWS, slots, packed, strict=True):
            wanted = stock_logits(stock_of(TINY), row, deltas[slot].export()["prompt"])
            torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_prompt_that_is_to_be_merged_is_one_named_error() -> None:
    """peft#2538: merging a prompt method failed deep inside with an attribute that is not there."""
    prompt = adapted(base_of(TINY), PTuning(tokens=2, encoder="none"))
    with pytest.raises(NotMergeable, match="is input, not weight"):
        prompt.method.merge(prompt.delta, prompt.base)


@pytest.mark.parametrize(
    ("name", "form"), [("llama", None), ("gemma2", None), ("gpt2", None), ("llama", "nf4"), ("gpt2", "int8")]
)
@pytest.mark.parametrize("placement", ["deep", "suffix", "prefix"])
def test_activation_checkpointing_changes_no_gradient_of_a_prompt(
    name: str, form: Quantisation | None, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft#869: keys and values in transformers' cache and a forward pass that is run again do not go together."""
    base = base_of(name) if form is None else quantised_base_of(name, form)
    config = {"deep": Prefix(tokens=3, hidden=6), **PLACED}[placement]
    batch = training_batch(placed_rows(5))

    def gradients() -> dict[str, Tensor]:
        delta = moved(config, base)
        with base.bind(delta):
            batch_loss(base, batch).backward()
        return {n: p.grad for n, p in delta.trainable().items() if p.grad is not None}

    wanted = gradients()
    ran: list[int] = []
    layers = base.model.transformer.h if name == "gpt2" else base.model.model.layers
    for i, layer in enumerate(layers):
        forward = layer.forward

        def again(*args: object, i: int = i, forward: object = forward, **kwargs: object) -> object:
            def counted(*args: object, **kwargs: object) -> object:
                ran.append(i)
                return forward(*args, **kwargs)  # type: ignore[operator]

            return checkpoint(partial(counted, **kwargs), *args, use_reentrant=False)

        monkeypatch.setattr(layer, "forward", again)
    got = gradients()
    assert len(ran) > len(layers), "layers ran again in the backward"
    assert got.keys() == wanted.keys()
    for parameter, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-5, atol=1e-6)


# --- merging, places, bases ---


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt-neox", "phi3", "gemma2"])
def test_merged_answers_as_unmerged(name: str) -> None:
    """unsloth#5410: a merged model answered otherwise than the adapter it was merged from."""
    base = base_of(name)
    lora = adapted(base, LoRA(rank=3, alpha=6.0))
    with torch.no_grad(), base.bind(lora.delta):
        live = packed_logits(base, ROWS)
    merged = copy.deepcopy(stock_of(name))
    with torch.no_grad():
        for weight, tensor in lora.method.merge(lora.delta, base).items():
            merged.get_parameter(weight).copy_(tensor)
        for row, wanted in zip(ROWS, live, strict=True):
            torch.testing.assert_close(stock_logits(merged, row), wanted, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(stock_logits(stock_of(name), row), wanted, atol=1e-2)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt-neox"])
def test_dora_of_two_adaptations_is_exact(name: str) -> None:
    """peft#3608: with two DoRA adaptations on one module, answers and merged weights took the norm of the wrong matrix. Here
    each answers as its merged model does, alone and beside the other in one batch."""
    base = base_of(name)
    deltas = {}
    for slot, config in enumerate((LoRA(rank=3, alpha=6.0, dora=True), LoRA(rank=2, dora=True, rank_stabilised=True))):
        deltas[slot] = adapted(base, config, size=0.1 + 0.1 * slot).delta
    slots = (1, 0, 1)
    with torch.no_grad(), base.bind(Bank(deltas)):
        mixed = packed_logits(base, ROWS, slots)
    for slot, delta in deltas.items():
        with torch.no_grad(), base.bind(delta):
            alone = packed_logits(base, ROWS)
        merged = copy.deepcopy(stock_of(name))
        with torch.no_grad():
            for weight, tensor in method("lora").merge(delta, base).items():
                merged.get_parameter(weight).copy_(tensor)
            for i, row in enumerate(ROWS):
                wanted = stock_logits(merged, row)
                torch.testing.assert_close(alone[i], wanted, rtol=1e-4, atol=1e-4)
                if slots[i] == slot:
                    torch.testing.assert_close(mixed[i], wanted, rtol=1e-4, atol=1e-4)
                assert not torch.allclose(stock_logits(stock_of(name), row), wanted, atol=1e-2)


def test_an_adaptation_that_matches_no_site_is_an_error(tmp_path: Path) -> None:
    """vllm#34186: adapter weights whose names matched no module were passed over, and the bare base answered."""
    gate = LoRA(rank=2, roles=(Role.MLP_GATE,))
    tensors = adapted(base_of(TINY), gate).delta.export()
    for attempt in (
        lambda: fresh(gate, base_of("gpt2")),
        lambda: method_of(gate).load(gate, base_of("gpt2"), tensors),
        lambda: method_of(LoRA()).load(LoRA(rank=2, roles=(Role.ATTN_Q,)), base_of(TINY), {}),
    ):
        with pytest.raises(Mismatch):
            attempt()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    names = [f"base_model.model.encoder.layer.0.{m}.lora_{p}.weight" for m in ("query", "value") for p in "AB"]
    write_tensors(tmp_path / TENSORS, {name: torch.zeros(2, 2) for name in names})
    with pytest.raises(Mismatch, match="matches no module") as caught:
        import_folder(tmp_path, base_of(TINY), task())
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("kind", METHODS)
def test_another_base_of_the_same_shape_is_refused(kind: str, tmp_path: Path) -> None:
    """peft#1932: an adapter was loaded onto another base than its own without a word."""
    mine = adapted(base_of(TINY), method(kind).variants[0])
    mine.save(tmp_path / "mine")
    with pytest.raises(Mismatch, match="weights of the base"):
        tt.load(tmp_path / "mine", base=tiny_base(TINY, seed=1))


def test_another_base_of_the_same_shape_is_refused_when_it_comes_in(tmp_path: Path) -> None:
    """peft#1932, from PEFT's own folder: all that it stores of the base is a name."""
    mine = adapted(base_of(TINY), LoRA(rank=2))
    FORMAT.write(mine, tmp_path)
    with pytest.raises(Mismatch, match="name of the base"):
        import_folder(tmp_path, base_of("qwen3"), task(), verify=False)


def changes(part: Adaptation) -> dict[str, Tensor]:
    """What a LoRA adds to the weights of each site, in float64, by the papers' scales."""
    config, tensors = part.config, part.delta.export()
    assert isinstance(config, LoRA)
    found = {}
    for site in part.delta.sites():
        rank = config.rank_at(site)
        scale = config.alphas.get(site.role, config.alpha) / (rank**0.5 if config.rank_stabilised else rank)
        found[site.key] = scale * (tensors[f"{site.key}.B"].double() @ tensors[f"{site.key}.A"].double())
    return found


def logits_of(part: Adaptation) -> list[Tensor]:
    with torch.no_grad(), part.base.bind(part.delta):
        return packed_logits(part.base, ROWS)


@pytest.mark.parametrize("how", ["linear", "svd"])
@pytest.mark.parametrize("stabilised", [False, True])
def test_one_lora_combined_with_weight_one_is_itself(stabilised: bool, how: How) -> None:
    """peft#3761: combined with weight 1, a rank-stabilised LoRA came out too strong by the root of its rank."""
    part = adapted(base_of(TINY), LoRA(rank=4, alpha=6.0, rank_stabilised=stabilised))
    for got, wanted in zip(logits_of(merge([part], how, weights=[1.0]).adaptation), logits_of(part), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_weighted_combination_is_the_weighted_sum_of_what_each_adds() -> None:
    """peft#3761, peft#3004: scales of rank-stabilised LoRAs counted wrongly, and B of one met A of the other."""
    parts = [
        adapted(base_of(TINY), LoRA(rank=rank, alpha=alpha, rank_stabilised=stabilised))
        for rank, alpha, stabilised in ((4, 6.0, True), (2, 1.0, True), (3, 9.0, False))
    ]
    weights = (0.7, -0.4, 1.5)
    each = [changes(part) for part in parts]
    exact, cut = merge(parts, weights=weights), merge(parts, "svd", weights=weights, rank=9)
    for merged in (exact, cut):
        assert merged.error < 1e-6, "nothing is lost at this rank, and it says so"
        for key, change in changes(merged.adaptation).items():
            wanted = sum(weight * own[key] for weight, own in zip(weights, each, strict=True))
            torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-5)
    assert merge(parts, "svd", weights=weights, rank=2).error > 0.01, "what a rank costs is told"


# --- training ---


@pytest.mark.parametrize("kind", METHODS)
def test_an_evaluation_stops_no_weight_from_training(kind: str) -> None:
    """litgpt#1287: what a validation pass under no_grad had cached was used in training, and its weights stood still."""
    base, config = base_of(TINY), method(kind).variants[0]
    delta = fresh(config, base)

    def look() -> Measured:
        with torch.no_grad():
            packed_logits(base, ROWS)
        looks.append(len(looks))
        return Measured(0.0, -float(len(looks)))  # each better than the last, so the last weights are kept

    looks: list[int] = []
    with torch.no_grad(), base.bind(delta):  # before training
        packed_logits(base, ROWS)
    before: dict[str, Tensor] = {name: p.detach().clone() for name, p in delta.trainable().items()}
    training = TRAINING.model_copy(update={"evaluations": 3})
    list(train(training, base, delta, training_rows(), learning_rate=1e-2, seed=5, evaluate=look))
    assert len(looks) == 3
    assert not [name for name, p in delta.trainable().items() if torch.equal(p, before[name])]


def test_an_imported_adaptation_is_the_one_that_was_trained(tmp_path: Path) -> None:
    """transformers#36480: an adapter was asked for and not applied; here the answers are those of the adapter."""
    mine = adapted(base_of(TINY), LoRA(rank=2))
    FORMAT.write(mine, tmp_path)
    back: Adaptation = import_folder(tmp_path, mine.base, task(), verify=False).adaptation
    texts = ["good one", "bad one"]
    bare = Adaptation(
        mine.base, task(), mine.config, {n: 0 * t for n, t in mine.delta.export().items()}, mine.origin
    ).predict(texts)
    assert back.predict(texts) == mine.predict(texts) != bare
