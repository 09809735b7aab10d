"""On a GPU: the same answers, losses and gradients as on a processor, the variable-length kernel beside the groups it
replaces, and training from start to end.

Needs a GPU, and so is no part of `make test`: `make test-cuda`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.laws.conftest import Case, batch_of, ids_of, kinds_and_variants, training_rows
from tests.unit.train.test_graphs import RECORDED, other_rows
from tritune.errors import Mismatch
from tritune.methods import method
from tritune.methods.base import Bank, Delta
from tritune.methods.lora import LoRA
from tritune.models import fp8, head, regions, varlen
from tritune.models.base import BARE, Batch, Edits, NoEdits, Segment, Span
from tritune.models.head import SummedLoss
from tritune.models.pretrained import Base
from tritune.models.tiny import CONFIGS, tiny_base
from tritune.run import Training
from tritune.text.pack import training_batch
from tritune.train.graphs import Graphs
from tritune.train.loop import Measured, batch_loss, train

#: families whose attention has no soft cap, so that the kernel runs; Mistral looks back six tokens
KERNEL = ("llama", "mistral", "qwen3", "gpt2", "gpt-neox", "opt")
ROWS = ids_of((9, 1, 14, 5, 30))
VARIANTS = kinds_and_variants()
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=[f"{kind}{i}" for kind, i in VARIANTS])


def spread(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, as a share of that of what is wanted."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).square().mean().sqrt() / (wanted.square().mean().sqrt() + 1e-12))


def both(kind: str, i: int) -> tuple[tuple[Base, Delta], tuple[Base, Delta]]:
    """The same moved delta on the same base, on the processor and on the GPU."""
    here, there = tiny_base("llama"), tiny_base("llama", device="cuda")
    delta = Case(method(kind), method(kind).variants[i], here).moved()
    moved = Case(method(kind), method(kind).variants[i], there).fresh().eval()
    moved.restore(delta.state())
    for module in moved.modules():
        if isinstance(module, torch.nn.RNNBase):
            module.train()  # cuDNN has no backward for one that only answers
    return (here, delta), (there, moved)


def loss_and_slopes(base: Base, delta: Delta, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    with base.bind(delta):
        loss = batch_loss(base, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    slopes = {name: p.grad for name, p in delta.trainable().items() if p.grad is not None}
    delta.zero_grad()
    return loss.detach(), slopes


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_answers_as_on_a_processor(name: str) -> None:
    at = torch.arange(sum(map(len, ROWS)))
    wanted = tiny_base(name).logits(batch_of(ROWS), at)
    found = tiny_base(name, device="cuda").logits(batch_of(ROWS), at)
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-3)


@each_variant
def test_every_method_learns_as_on_a_processor(variant: tuple[str, int]) -> None:
    (here, delta), (there, moved) = both(*variant)
    batch = training_batch(training_rows())
    wanted, slopes = loss_and_slopes(here, delta, batch)
    found, slopes_there = loss_and_slopes(there, moved, batch)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-4)
    assert slopes.keys() == slopes_there.keys()
    for name, slope in slopes.items():
        assert spread(slopes_there[name], slope) < 2e-3, name


@each_variant
def test_every_method_moves_and_comes_back_as_it_was_on_a_processor(variant: tuple[str, int]) -> None:
    kind, i = variant
    base = tiny_base("llama", device="cuda")
    made, config = method(kind), method(kind).variants[i]
    delta = made.init(config, base, torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in delta.trainable().items()}
    training = Training(epochs=2.0, batch_tokens=40, evaluations=2)
    looks = iter((0.1, 0.2))
    events = list(
        train(
            training,
            base,
            delta,
            training_rows(),
            learning_rate=1e-2,
            seed=5,
            evaluate=lambda: Measured(next(looks), 1.0),
        )
    )
    assert events[-1].kind == "done"
    assert not [name for name, p in delta.trainable().items() if torch.equal(p, before[name])]
    here = tiny_base("llama")
    exported = {name: t.cpu() for name, t in delta.export().items()}
    loaded = made.load(config, here, exported).eval()
    at, answers = torch.arange(sum(map(len, ROWS))), []
    for one, edits in ((base, delta.eval()), (here, loaded)):
        with torch.no_grad(), one.bind(edits):
            answers.append(one.logits(batch_of(ROWS), at).cpu())
    torch.testing.assert_close(*answers, rtol=1e-3, atol=1e-3)


@dataclass
class Prompts(NoEdits):
    """Virtual tokens in front of or behind texts."""

    at: tuple[Segment, ...]

    def segments(self) -> tuple[Segment, ...]:
        return self.at


def shared_rows() -> Batch:
    """Two answers behind one context behind one instruction, a row by itself, and a longer one."""
    ids = ids_of((6, 7, 2, 3, 9, 40), seed=4)
    parents: list[tuple[int, ...]] = [(), (0,), (0, 1), (0, 1), (), (0,)]
    texts = [None, 7, None, None, 9, 40]
    starts = [sum(map(len, ids[:i])) for i in range(len(ids))]
    spans = tuple(
        Span(start, len(row), seen, text) for start, row, seen, text in zip(starts, ids, parents, texts, strict=True)
    )
    return Batch(torch.tensor([i for row in ids for i in row]), spans)


def edits_of(kind: str, base: Base, dtype: torch.dtype) -> tuple[Edits, list[Tensor]]:
    """What is bound, and what of it learns."""
    if kind == "bare":
        return NoEdits(), []
    torch.manual_seed(1)
    prompt_PD = (torch.randn(5, base.d_embedding) * 0.5).cuda().requires_grad_()
    if kind in ("front", "behind"):
        return Prompts((Segment(prompt_PD, behind=kind == "behind"),)), [prompt_PD]
    made = method(kind)
    delta = made.init(made.Config(), base, torch.Generator().manual_seed(0)).eval()
    for p in delta.trainable().values():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p)
    return delta, list(delta.trainable().values())


@pytest.mark.parametrize("kind", ["bare", "front", "behind", "prefix", "lora", "bottleneck"])
@pytest.mark.parametrize("name", KERNEL)
def test_the_kernel_equals_the_groups(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rounds both; the groups in fp32 tell how far either may be."""
    narrow, wide = tiny_base(name, dtype=torch.bfloat16, device="cuda"), tiny_base(name, device="cuda")
    calls: list[int] = []
    attend = varlen.attend
    monkeypatch.setattr(varlen, "attend", lambda *args: calls.append(1) or attend(*args))
    results = []
    for base, kernel in ((narrow, True), (narrow, False), (wide, False)):
        if not kernel:
            monkeypatch.setattr(varlen, "runs_here", lambda query, softcap: False)
        edits, learned = edits_of(kind, base, base.dtype)
        batch = shared_rows()
        ends = torch.tensor([span.start + span.length - 1 for span in batch.spans[2:]])
        with base.bind(edits):
            logits = base.logits(batch, ends)
            slopes = torch.autograd.grad(logits.square().sum(), learned) if learned else ()
        results.append([logits, torch.cat([slope.flatten() for slope in slopes])] if slopes else [logits])
    assert calls, "the kernel did not run"
    for kernel_, groups, exact in zip(*results, strict=True):
        allowed = 2 * spread(groups, exact) + 0.02
        assert spread(kernel_, exact) < allowed
    assert spread(results[0][0], results[2][0]) < 0.2


def test_neighbours_of_other_slots_do_not_matter_to_the_kernel() -> None:
    base = tiny_base("llama", dtype=torch.bfloat16, device="cuda")
    deltas: dict[int, Delta] = {}
    for slot, kind in enumerate(("lora", "ptuning", "prefix", "bottleneck")):
        delta, _ = edits_of(kind, base, base.dtype)
        deltas[slot] = delta  # type: ignore[assignment]
    slots = (0, 1, 2, 3, BARE)
    at = torch.arange(sum(map(len, ROWS)))
    with torch.no_grad(), base.bind(Bank(deltas)):
        together = base.logits(batch_of(ROWS, slots), at).split([len(row) for row in ROWS])
    for row, slot, mixed in zip(ROWS, slots, together, strict=True):
        edits: Edits = NoEdits() if slot == BARE else deltas[slot]
        with torch.no_grad(), base.bind(edits):
            alone = base.logits(batch_of([row]), torch.arange(len(row)))
        assert spread(mixed, alone) < 0.05


@pytest.mark.parametrize("rows_at_once", [3, 64])
def test_losses_in_pieces_are_those_of_whole_logits(rows_at_once: int) -> None:
    torch.manual_seed(0)
    x_KD = torch.randn(64, 48, device="cuda").bfloat16().requires_grad_()
    weight_VD = (0.2 * torch.randn(500, 48, device="cuda")).bfloat16().requires_grad_()
    labels_K = torch.randint(0, 500, (64,), device="cuda")
    wanted = F.cross_entropy(F.linear(x_KD.float(), weight_VD.float()), labels_K, reduction="sum")
    slopes = torch.autograd.grad(wanted, (x_KD, weight_VD))
    loss = SummedLoss.apply(x_KD, weight_VD, None, labels_K, rows_at_once * 4 * 500)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
    for found, slope in zip(torch.autograd.grad(loss, (x_KD, weight_VD)), slopes, strict=True):
        assert spread(found, slope) < 0.01


def test_logits_of_a_narrow_base_are_wide() -> None:
    base = tiny_base("llama", dtype=torch.bfloat16, device="cuda")
    x_KD = torch.randn(9, 32, device="cuda").bfloat16()
    weight_VD = base.model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    torch.testing.assert_close(head.product(x_KD, weight_VD), x_KD.float() @ weight_VD.float().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_in_8_bits_are_those_of_what_was_rounded(n: int, transposed: bool) -> None:
    """The oracle counts in float64: a processor's own product of this kind came after torch 2.11."""
    draw = torch.Generator().manual_seed(n)
    weight = 0.1 * torch.randn((64, 96) if transposed else (96, 64), generator=draw)
    codes, scales_E = fp8.pack(weight.T if transposed else weight)
    x, g = torch.randn(2, n, 64, generator=draw).bfloat16(), torch.randn(2, n, 96, generator=draw).bfloat16()
    there = [t.cuda() for t in (codes, scales_E, x, g)]
    numbers_ED = codes.view(fp8.FORMAT).double()

    def dequantised(rows: Tensor) -> Tensor:
        found, scales = fp8.rounded(rows.flatten(0, -2))
        return (found.double() * scales.double()).unflatten(0, rows.shape[:-1])

    if not fp8.runs_here(there[2], there[0]):
        assert torch.cuda.get_device_capability() < fp8.CAPABILITY
        return
    assert spread(fp8.product(there[2], *there[:2]), dequantised(x) @ (numbers_ED * scales_E[:, None]).T) < 2**-7
    assert spread(fp8.slope(there[3], *there[:2]), dequantised(g.float() * scales_E) @ numbers_ED) < 2**-7


def test_a_base_in_fp8_learns_nearly_as_its_weights_do() -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):  # only bf16 is multiplied in 8 bits
        base = tiny_base("llama", dtype=dtype, device="cuda", quantise="fp8")
        delta = Case(method("lora"), method("lora").variants[0], base).moved()
        found.append(loss_and_slopes(base, delta, training_batch(training_rows())))
    (wanted, slopes), (loss, rough) = found
    torch.testing.assert_close(loss.float(), wanted, rtol=0.05, atol=0.05)
    whole, rounded = (torch.cat([g.flatten().float() for g in each.values()]) for each in (slopes, rough))
    assert spread(rounded, whole) < 0.65


def test_dropout_of_a_run_is_the_same_every_time() -> None:
    finals: list[Mapping[str, Any]] = []
    for _ in range(2):
        base = tiny_base("llama", device="cuda")
        made = method("lora")
        delta = made.init(made.Config(dropout=0.3), base, torch.Generator().manual_seed(0))
        list(
            train(
                Training(epochs=1.0, batch_tokens=40, evaluations=0),
                base,
                delta,
                training_rows(),
                learning_rate=1e-2,
                seed=5,
            )
        )
        finals.append(delta.export())
    for name, tensor in finals[0].items():
        torch.testing.assert_close(tensor, finals[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", RECORDED, ids=[f"{kind}{i}" for kind, i in RECORDED])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recorded_passes_learn_what_others_do(name: str, variant: tuple[str, int]) -> None:
    """Two shapes in turn: of each the first pass runs kernel by kernel, the second is recorded, the others are launched."""
    kind, i = variant
    base = tiny_base(name, dtype=torch.bfloat16, device="cuda")
    begun = tuple(range(5, 45))
    plain = [other_rows(n) for n in range(4)]
    sharing = [[replace(row, context=(*begun, *row.context[-5:])) for row in rows] for rows in plain]
    batches = [rows for pair in zip(sharing, plain, strict=True) for rows in pair]
    try:
        case = Case(method(kind), method(kind).variants[i], base)
        case.fresh()
    except Mismatch:  # not for this family
        assert name != "llama"
        return
    found = []
    for recorded in (False, True):
        delta = case.moved()
        for module in delta.modules():
            if isinstance(module, torch.nn.RNNBase):
                module.train()
        losses = []
        with base.bind(delta):
            if not base.recordable:
                assert name != "llama"
                return
            steps = Graphs(base, delta)
            for rows in batches:
                if recorded:
                    losses.append(steps.backward(training_batch(rows), 7))
                else:
                    loss = batch_loss(base, training_batch(rows)) / 7
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(float(loss.detach()))
            assert steps.recorded == (2 if recorded else 0)
        found.append((losses, {name: p.grad for name, p in delta.trainable().items() if p.grad is not None}))
    (wanted, slopes), (losses, launched) = found
    assert losses == pytest.approx(wanted, rel=0.02)
    assert launched.keys() == slopes.keys()
    for part, slope in slopes.items():
        assert spread(launched[part], slope) < 0.1, part


def test_a_recorded_run_ends_near_one_without() -> None:
    """Parameters move between launches, and dev is looked at in between."""
    found = []
    for wanted in (False, True):
        base = tiny_base("llama", dtype=torch.bfloat16, device="cuda")
        base.cuda_graphs = wanted
        delta = method("lora").init(LoRA(rank=4), base, torch.Generator().manual_seed(0))
        training = Training(epochs=12, batch_tokens=60, evaluations=3)
        options = {"learning_rate": 3e-3, "seed": 1, "evaluate": lambda: Measured(0.5, 1.0)}
        events = list(train(training, base, delta, training_rows(), **options))
        found.append([event.point.train_loss for event in events if event.kind == "step"])
    for with_graphs, without in zip(found[1], found[0], strict=True):
        assert with_graphs == pytest.approx(without, rel=0.1)
    assert sum(found[1][-6:]) < 0.9 * sum(found[1][:6])


def test_dropout_draws_anew_at_every_launch() -> None:
    base = tiny_base("llama", dtype=torch.bfloat16, device="cuda")
    delta = Case(method("lora"), LoRA(rank=4, dropout=0.3), base).moved().train()
    with base.bind(delta):
        steps = Graphs(base, delta)
        losses = [steps.backward(training_batch(other_rows(0)), 7) for _ in range(8)]
    assert steps.recorded == 1
    assert len(set(losses[2:])) > 1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_regions_learn_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4 * 300 * 5)  # a loss in pieces, too
    found = []
    for on in (False, True):
        regions.use(on)
        try:
            (_, _), (base, delta) = both(kind, 0)
            found.append(loss_and_slopes(base, delta, training_batch(training_rows())))
        finally:
            regions.use(False)
    (wanted, slopes), (loss, slopes_there) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    for name, slope in slopes.items():
        assert spread(slopes_there[name], slope) < 1e-3, name
