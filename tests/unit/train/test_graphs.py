"""Recorded steps, on a processor: a masked product stands for the GPU's kernel, and a trace of torch's operations for what a
GPU records: at every launch it does the same in the same memory, whatever Python would do. The GPU itself: `tests/cuda`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.laws.conftest import Case, kinds_and_variants, training_rows
from tritune.errors import Mismatch
from tritune.methods import method, method_of
from tritune.methods.full import Full
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.methods.stack import Stack
from tritune.models import varlen
from tritune.models.base import IGNORE, Batch, Role, Span
from tritune.models.library import AutoConfig, AutoModelForCausalLM
from tritune.models.load import load_base
from tritune.models.past import Virtual
from tritune.models.pretrained import Base
from tritune.models.tiny import CONFIGS, byte_tokenizer, tiny_base
from tritune.run import Training
from tritune.spec import Digests, MethodConfig, digest
from tritune.text.encode import Encoded
from tritune.text.few_shapes import LABELS, SPANS, TOKENS, learned, rounded
from tritune.text.pack import training_batch
from tritune.train import graphs
from tritune.train.graphs import Graphs, Work, may_be_recorded
from tritune.train.loop import batch_loss, train

ROWS = training_rows()
VARIANTS = kinds_and_variants()


def traced(work: Work) -> Work:
    """The operations of the work, and no Python."""
    operations: Work = make_fx(lambda: work())()  # it counts the arguments of what it gets, self included
    return torch.no_grad()(operations)


def masked(
    q_NHd: Tensor, k_TKd: Tensor, v_TKd: Tensor, q_ends: Tensor, k_ends: Tensor, *longest: int, **how: Any
) -> Tensor:
    """All queries with all keys, of which each span's own count: the queries are its last tokens."""
    (back, _), repeat = how["window_size"], q_NHd.shape[1] // k_TKd.shape[1]
    at_N, at_T = torch.arange(len(q_NHd)), torch.arange(len(k_TKd))
    span_N, span_T = (torch.searchsorted(ends, at, right=True) for ends, at in ((q_ends, at_N), (k_ends, at_T)))
    distance = (k_ends[span_N] - q_ends[span_N] + at_N)[:, None] - at_T
    seen = (span_N[:, None] == span_T) & (distance >= 0) & ((distance <= back) | (back < 0))
    q, k, v = (t.transpose(0, 1) for t in (q_NHd, *(t.repeat_interleave(repeat, 1) for t in (k_TKd, v_TKd))))
    score = (q @ k.transpose(1, 2) * how["scale"]).masked_fill(~seen, float("-inf"))
    return (score.softmax(-1) @ v).transpose(0, 1)


@pytest.fixture
def by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is laid out for the GPU's kernel is done by the masked product; the rest by the groups."""
    monkeypatch.setattr(varlen, "_kernel", lambda: masked)
    monkeypatch.setattr(varlen, "suits", lambda device, dtype, width: True)


def gradients(
    base: Base, case: Case, batches: Sequence[Sequence[Encoded]], recorded: bool, shapes: int = 1
) -> tuple[list[float], Any]:
    """Of a step of several passes; and the losses of these. `shapes`: so many come twice."""
    delta = case.moved().train()
    n = sum(len(row.target) for rows in batches for row in rows)
    losses = []
    torch.manual_seed(0)
    with base.bind(delta):
        lstm = any(isinstance(module, torch.nn.RNNBase) for module in delta.modules())  # a processor's cannot be traced
        steps = Graphs(base, delta, (lambda work: work) if lstm else traced)
        for rows in batches:
            if recorded:
                losses.append(steps.backward(training_batch(rows), n))
            else:
                loss = batch_loss(base, training_batch(rows)) / n
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(float(loss.detach()))
        if recorded:
            assert steps.recorded == shapes
    return losses, {name: p.grad for name, p in delta.trainable().items()}


def without_chance(kind: str, i: int) -> bool:
    """Filled up batches draw other random numbers."""
    return '"dropout":0.' not in method(kind).variants[i].model_dump_json().replace('"dropout":0.0', "")


def recorded_variants() -> list[tuple[str, int]]:
    """All but those that go on as before, and those that draw: filled up batches draw other numbers."""
    base, found = tiny_base("llama", dtype=torch.bfloat16), []
    for kind, i in VARIANTS:
        delta = Case(method(kind), method(kind).variants[i], base).fresh()
        at_embeddings = any(site.role is Role.EMBED for site in delta.sites())
        if may_be_recorded(delta) and without_chance(kind, i) and not at_embeddings:
            found.append((kind, i))
    return found


RECORDED = recorded_variants()


def other_rows(n: int) -> list[Encoded]:
    """Five rows of other ids in another order, so that the lengths in a batch of them are the same, but elsewhere."""
    rows = [*ROWS[n:5], *ROWS[:n]]
    return [replace(row, context=tuple(3 + (id_ + 41 * n) % 250 for id_ in row.context)) for row in rows]


def test_most_variants_are_recorded() -> None:
    assert {kind for kind, _ in RECORDED} == {kind for kind, _ in VARIANTS} - {"full"}
    assert len(RECORDED) > len(VARIANTS) / 2


@pytest.mark.parametrize("variant", RECORDED, ids=[f"{kind}{i}" for kind, i in RECORDED])
@pytest.mark.usefixtures("by_the_kernel")
def test_every_method_learns_what_it_does_without(variant: tuple[str, int]) -> None:
    """Four passes of one shape over other rows: the third and the fourth run what was recorded over the second."""
    kind, i = variant
    base = tiny_base("llama")
    case = Case(method(kind), method(kind).variants[i], base)
    batches = [other_rows(n) for n in range(4)]
    wanted, slopes = gradients(base, case, batches, recorded=False)
    found, recorded = gradients(base, case, batches, recorded=True)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert recorded.keys() == slopes.keys()
    largest = max(float(slope.abs().max()) for slope in slopes.values() if slope is not None)
    for name, slope in slopes.items():
        assert (recorded[name] is None) == (slope is None)
        if slope is not None:
            assert recorded[name].stride() == slope.stride(), "the optimizer goes through memory in its order"
            torch.testing.assert_close(recorded[name], slope, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.usefixtures("by_the_kernel")
def test_a_whole_run_ends_where_it_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "on_gpu", lambda device: traced)
    made: list[Graphs] = []
    whole = Graphs.__init__
    monkeypatch.setattr(Graphs, "__init__", lambda self, *given: made.append(self) or whole(self, *given))
    ends = []
    for wanted in (False, True):
        base = tiny_base("llama")
        base.cuda_graphs = wanted
        delta = Case(method("lora"), LoRA(rank=2), base).fresh()
        training = Training(epochs=4, batch_tokens=60, evaluations=0, accumulate=2)
        list(train(training, base, delta, ROWS, learning_rate=1e-2, seed=1))
        ends.append(delta.export())
    assert len(made) == 1
    assert made[0].recorded == 1
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=2e-3, atol=2e-5)


@pytest.mark.usefixtures("by_the_kernel")
def test_losses_in_pieces_are_recorded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritune.models.head.CHUNK", 4 * 300 * 3)
    base = tiny_base("llama")
    case = Case(method("lora"), LoRA(rank=2), base)
    batches = [other_rows(n) for n in range(3)]
    wanted, slopes = gradients(base, case, batches, recorded=False)
    found, recorded = gradients(base, case, batches, recorded=True)
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(recorded[name], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


@pytest.mark.usefixtures("by_the_kernel")
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_losses_are_not_taken_in_pieces_because_of_what_is_filled_up(
    more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around the number of labels from which they are."""
    base = tiny_base("llama")
    case = Case(method("lora"), LoRA(rank=2), base)
    n = sum(len(row.target) for row in ROWS[:5])
    monkeypatch.setattr("tritune.models.head.CHUNK", 4 * base.config.vocab_size * n + more)
    wanted, slopes = gradients(base, case, [ROWS[:5]] * 3, recorded=False)
    found, recorded = gradients(base, case, [ROWS[:5]] * 3, recorded=True)
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(recorded[name], slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))


@pytest.mark.usefixtures("by_the_kernel")
@pytest.mark.parametrize(
    ("name", "config", "shared"),
    [
        ("llama", LoRA(rank=2), 40),
        ("llama", PTuning(tokens=4, encoder="none"), 40),
        ("opt", LoRA(rank=2), tiny_base("opt").max_positions - 12),
    ],
    ids=["lora", "ptuning", "near-the-last-position"],
)
def test_shapes_in_turn_and_rows_that_share_a_beginning(name: str, config: MethodConfig, shared: int) -> None:
    """One shape is launched between two launches of the other. What is filled up needs no position that the rows do not."""
    base = tiny_base(name)
    case = Case(method_of(config), config, base)
    begun = tuple(5 + i % 200 for i in range(shared))
    plain = [other_rows(n) for n in range(4)]
    sharing = [[replace(row, context=(*begun, *row.context[-5:])) for row in rows] for rows in plain]
    assert training_batch(sharing[0]).spans[1].parents == (0,)
    batches = [rows for pair in zip(sharing, plain, strict=True) for rows in pair]
    wanted, slopes = gradients(base, case, batches, recorded=False)
    found, recorded = gradients(base, case, batches, recorded=True, shapes=2)
    assert found == pytest.approx(wanted, rel=1e-4)
    largest = max(float(slope.abs().max()) for slope in slopes.values())
    for name_, slope in slopes.items():
        torch.testing.assert_close(recorded[name_], slope, rtol=1e-3, atol=1e-4 * largest)


@pytest.mark.usefixtures("by_the_kernel")
def test_layers_that_are_left_out_stay_so() -> None:
    base = tiny_base("llama")
    config = LoRA(rank=2, top_layers=1)
    with base.remembering({ROWS[0].context: ()}), base.bind(Case(method("lora"), config, base).fresh()):
        assert not base.recordable
    with base.bind(Case(method("lora"), config, base).fresh()):
        assert base.recordable


@pytest.mark.usefixtures("by_the_kernel")
def test_no_more_shapes_are_recorded_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    monkeypatch.setattr("tritune.text.few_shapes.TOKENS", 32)
    base = tiny_base("llama")
    delta = Case(method("lora"), LoRA(rank=2), base).fresh()
    with base.bind(delta):
        steps = Graphs(base, delta, traced)
        for rows in (ROWS[:2], ROWS, ROWS[:2], ROWS, ROWS):
            steps.backward(training_batch(rows), 1)
        assert steps.recorded == 1


def test_what_replaces_the_base_or_leaves_texts_alone_is_not_recorded() -> None:
    base = tiny_base("llama")
    behind = PTuning(tokens=2, hidden=4, placement="suffix")
    for config, may in ((Full(), False), (behind, False), (Stack.of([behind, LoRA(rank=2)]), True)):
        assert may_be_recorded(Case(method_of(config), config, base).fresh()) == may


def test_a_processor_has_no_graphs() -> None:
    with pytest.raises(Mismatch, match=r"CUDA graphs are for GPUs, and 'cpu' is none\.\nLeave --cuda-graphs out"):
        load_base("smollm2-135m", device="cpu", cuda_graphs=True)
    assert not tiny_base("llama").recordable


# --- few shapes ---


@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(0, 3))
def test_batches_are_filled_up_to_few_shapes(lengths: list[int], shared: int) -> None:
    spans = [Span(0, shared)] if shared else []
    for n in lengths:
        spans.append(Span(sum(s.length for s in spans), n, (0,) if shared else (), n - 1))
    n_tokens = shared + sum(lengths)
    labels = torch.full((n_tokens,), IGNORE)
    labels[[span.start + span.length - 1 for span in spans[bool(shared) :]]] = 7
    batch = Batch(torch.arange(n_tokens), tuple(spans), labels)
    filled = rounded(batch)
    assert filled.labels_N is not None
    assert (len(filled.spans) % SPANS, len(filled.tokens_N) % TOKENS) == (0, 0)
    assert filled.spans[: len(spans)] == batch.spans
    assert torch.equal(filled.tokens_N[:n_tokens], batch.tokens_N)
    assert torch.equal(filled.labels_N[:n_tokens], labels)
    assert bool((filled.labels_N[n_tokens:] == IGNORE).all())
    end = n_tokens
    for span in filled.spans[len(spans) :]:
        assert (span.start, span.parents) == (end, spans[-1].parents)
        assert span.length >= 1
        end += span.length
    assert end == len(filled.tokens_N)
    assert max(span.length for span in filled.spans) == max(span.length for span in spans[bool(shared) :] + spans[:1])
    at_K, labels_K = learned(filled)
    assert len(at_K) % LABELS == 0
    assert torch.equal(at_K[: len(lengths)], (labels != IGNORE).nonzero()[:, 0])
    assert bool((labels_K[len(lengths) :] == IGNORE).all())


# --- what may not be recorded ---


class NothingFromTheProcessor(TorchDispatchMode):
    """A tensor of the processor that reaches a GPU while steps are recorded would be the same at every launch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.ndim:
                assert tensor.device.type != "cpu", f"{func} reads {tuple(tensor.shape)} of the processor"
        return func(*args, **(kwargs or {}))


def without_numbers(name: str) -> Base:
    """A base whose tensors have shapes alone: what wants to see a number fails."""
    kind, options = CONFIGS[name]
    config = AutoConfig.for_model(kind, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    same = digest("no numbers")
    return Base(model, byte_tokenizer(), name, Digests(weights=same, config=same, tokenizer=same))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_reads_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward of every method run on shapes alone, with the kernel's own; so nothing waits for the GPU."""
    monkeypatch.setattr(varlen, "suits", lambda device, dtype, width: True)
    n = 0
    for kind, i in VARIANTS:
        base, made, config = without_numbers(name), method(kind), method(kind).variants[i]
        try:
            try:
                delta = made.init(config, base, torch.Generator().manual_seed(0))
            except (NotImplementedError, RuntimeError):  # it starts from numbers of the base
                if name == "opt-post-norm":  # and would go on reading that base's norms
                    continue
                delta = made.init(config, tiny_base(name), torch.Generator().manual_seed(0))
        except Mismatch:  # not for this family
            continue
        if not may_be_recorded(delta):
            continue
        delta = delta.to("meta")
        with base.bind(delta):
            if not base.recordable:
                continue
            filled = rounded(training_batch(ROWS))
            with torch.no_grad():
                virtual = Virtual(delta.segments())
            prepared = base.prepared(filled, *learned(filled), virtual).to(base.device)
            with NothingFromTheProcessor():
                loss = base.loss_of(prepared)
                torch.autograd.grad(loss, tuple(delta.trainable().values()), allow_unused=True)
        n += 1
    assert n > 10 or name in ("gemma2", "gpt-neox", "gpt-neox-serial"), "hardly a method was recorded"
