"""What "a method works" means. Each law runs for every method, variant and base of the conftest; none knows a name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.laws.conftest import Case, ids_of, outputs, shared_base, training_rows
from tritune.errors import BadSettings, Diverged, Mismatch, NotMergeable
from tritune.methods import METHODS, method, method_of
from tritune.methods.base import Bank, Delta
from tritune.models import round_numbers
from tritune.models.base import BARE, Batch, NoEdits
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.run import Training
from tritune.spec import Scope
from tritune.text.pack import training_batch
from tritune.train.loop import Measured, batch_loss, train
from tritune.train.state import TrainState

ROWS = ids_of((9, 1, 14, 5))
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def snapshot(base: Base) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in base.parameters().items()}


def run(case: Case, delta: Delta, training: Training, **options: object) -> list[object]:
    return list(train(training, case.base, delta, training_rows(), learning_rate=1e-2, seed=5, **options))  # type: ignore[arg-type]


FIVE_STEPS = Training(epochs=1.0, batch_tokens=30, warmup=0.0, schedule="constant", evaluations=0)


# --- 1: the table, the config, the budget ---


def test_the_table_resolves_and_the_config_survives_json(case: Case) -> None:
    assert method(case.method.kind) is case.method
    assert method_of(case.config) is case.method
    document = json.loads(json.dumps(case.config.model_dump(mode="json")))
    assert case.method.Config.read(document, "test") == case.config


def test_an_unknown_key_is_refused(case: Case) -> None:
    with pytest.raises(BadSettings, match="rnak: there is no such setting"):
        case.method.Config(**{**case.config.model_dump(), "rnak": 3})


def test_budget_equals_reality(case: Case) -> None:
    budget = case.method.budget(case.config, case.base)
    delta = case.fresh()
    exported = delta.export()
    assert budget.trained == sum(p.numel() for p in delta.trainable().values())
    assert budget.stored == sum(t.numel() for t in exported.values())
    assert budget.stored_bytes == sum(t.numel() * t.element_size() for t in exported.values())
    assert {n: tuple(t.shape) for n, t in exported.items()} == dict(case.method.shapes(case.config, case.base))


def test_budget_counts_the_added_flops(case: Case) -> None:
    case.base.twins = False  # the counter does not know products that add in place
    try:
        per_length = flops_per_token(case)
    finally:
        case.base.twins = True
    assert per_length[1] - per_length[0] == case.method.budget(case.config, case.base).added_flops


def flops_per_token(case: Case) -> list[float]:
    """Of the bare base, and with a moved delta bound."""
    per_length = []
    for edits in (NoEdits(), case.moved().requires_grad_(False)):
        counted = []
        for length in (8, 20):  # what is added once per batch (a virtual prompt) cancels in the difference
            with FlopCounterMode(display=False) as flops:
                outputs(case.base, edits, ids_of((length,)))
            attention = 0
            for name, n in flops.get_flop_counts()["Global"].items():
                attention += n if name in (torch.ops.aten.bmm, torch.ops.aten.baddbmm) else 0
            counted.append(flops.get_total_flops() - attention)
        per_length.append((counted[1] - counted[0]) / 12)
    return per_length


# --- 2: the start ---


def test_a_fresh_delta_is_the_identity_exactly_where_declared(case: Case) -> None:
    bare, fresh = outputs(case.base, NoEdits(), ROWS), outputs(case.base, case.fresh().eval(), ROWS)
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(bare, fresh, strict=True))
    assert same == case.method.identity_at_start(case.config)


# --- 3: what moves ---


def test_every_declared_tensor_moves_and_nothing_else(case: Case) -> None:
    delta = case.fresh()
    before = {name: p.detach().clone() for name, p in delta.trainable().items()}
    base_before = snapshot(case.base)

    def look() -> Measured:  # an evaluation in between must not stop anything from training
        with torch.no_grad():
            case.base.logits(training_batch(training_rows()), torch.tensor([0]))
        return Measured(0.0, -float(next(looks)))  # each better than the last, so the last weights are kept

    looks = itertools.count()
    training = FIVE_STEPS.model_copy(update={"evaluations": 2})
    events = [e for e in run(case, delta, training, evaluate=look) if e.kind == "step"]  # type: ignore[attr-defined]
    assert len(events) >= 5
    still = [name for name, p in delta.trainable().items() if torch.equal(p, before[name])]
    assert not still
    assert snapshot(case.base) == base_before
    assert not any(p.requires_grad or p.grad is not None for p in case.base.parameters().values())


# --- 4: gradients ---


def test_gradients_agree_with_finite_differences(case: Case) -> None:
    base = tiny_base(case.base.name.removeprefix("tiny-"), dtype=torch.float64)
    delta = Case(case.method, case.config, base).moved().double()
    batch = training_batch(training_rows(6))
    with base.bind(delta):
        loss = batch_loss(base, batch)
        loss.backward()
        assert loss.dtype is torch.float64
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            directions = {n: torch.randn(p.shape, generator=generator).double() for n, p in delta.trainable().items()}
            slope = sum(float((p.grad * directions[n]).sum()) for n, p in delta.trainable().items())  # type: ignore[operator]
            with delta.constants_held():  # the gradient is declared to be that of the loss with these as they are
                values = [loss_at(delta, base, batch, directions, step) for step in (1e-5, -1e-5)]
            # Some families norm in fp32 whatever the model's format: that noise bounds the agreement.
            assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=2e-2, abs=0.3)


@torch.no_grad()
def loss_at(delta: Delta, base: Base, batch: Batch, directions: Mapping[str, torch.Tensor], step: float) -> float:
    """The loss so far along the directions; the delta is left where it was."""
    for name, parameter in delta.trainable().items():
        parameter += step * directions[name]
    loss = float(batch_loss(base, batch))
    for name, parameter in delta.trainable().items():
        parameter -= step * directions[name]
    return loss


# --- 5: neighbours ---


def test_packed_equals_solo(case: Case) -> None:
    delta = case.moved()
    packed = outputs(case.base, delta, ROWS)
    for row, logits in zip(ROWS, packed, strict=True):
        torch.testing.assert_close(outputs(case.base, delta, [row])[0], logits, **CLOSE)


def test_any_order_and_any_neighbours(case: Case) -> None:
    delta = case.moved()
    wanted = outputs(case.base, delta, ROWS)
    for order in itertools.islice(itertools.permutations(range(len(ROWS))), 3, 20, 4):
        more = [*[ROWS[i] for i in order], *ids_of((30, 2), seed=9)]
        for i, logits in zip(order, outputs(case.base, delta, more), strict=False):
            torch.testing.assert_close(logits, wanted[i], **CLOSE)


def test_mixed_with_other_adaptations_equals_alone(case: Case) -> None:
    if case.method.scope is Scope.BASE:
        with pytest.raises(Mismatch, match="whole base"):
            Bank({0: case.fresh()})
        return
    other = method(next(kind for kind in METHODS if kind != case.method.kind and method(kind).scope is Scope.ROW))
    deltas = {0: case.moved(1), 1: case.moved(2), 2: Case(other, other.variants[0], case.base).moved(3)}
    alone = {slot: outputs(case.base, delta, ROWS) for slot, delta in deltas.items()}
    alone[BARE] = outputs(case.base, NoEdits(), ROWS)
    for a, b in itertools.combinations(alone, 2):  # or the law would hold for code that does nothing
        assert not torch.allclose(alone[a][0], alone[b][0], atol=1e-3)
    for slots in ((0, 1, 2, BARE), (BARE, 2, 2, 0), (1, 0, BARE, 1)):
        mixed = outputs(case.base, Bank(deltas), ROWS, slots)
        for i, slot in enumerate(slots):
            torch.testing.assert_close(mixed[i], alone[slot][i], **CLOSE)


def test_rows_of_a_slot_that_nobody_has_are_refused_not_answered_bare(case: Case) -> None:
    deltas = {} if case.method.scope is Scope.BASE else {0: case.moved(1), 4: case.moved(2)}
    with pytest.raises(Mismatch) as caught:
        outputs(case.base, Bank(deltas), ROWS, (BARE, 7, 3, 7))
    assert [problem.where for problem in caught.value.problems] == ["slot 3", "slot 7"]
    assert len(outputs(case.base, Bank(deltas), ROWS, (BARE,) * 4)) == 4


# --- 6: export and load ---


def test_export_then_load_answers_equally(case: Case) -> None:
    delta = case.moved()
    exported = delta.export()
    loaded = case.method.load(case.config, case.base, {n: t.clone() for n, t in exported.items()}).eval()
    for a, b in zip(outputs(case.base, delta, ROWS), outputs(case.base, loaded, ROWS), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)  # torch's LSTM rounds otherwise with gradients
    for name, tensor in loaded.export().items():
        assert torch.equal(tensor, exported[name])


def test_the_export_holds_no_tensor_of_the_base(case: Case) -> None:
    base = {p.detach().numpy().tobytes() for p in case.base.parameters().values()}
    assert not base & {t.numpy().tobytes() for t in case.moved().export().values()}


# --- 7: resume ---


def test_resume_is_bit_for_bit(case: Case) -> None:
    training = Training(epochs=2.0, batch_tokens=40, accumulate=1, evaluations=3)

    def look() -> Measured:
        return Measured(0.5, float(batch_loss(case.base, training_batch(training_rows(4))).detach()))

    straight = case.fresh()
    run(case, straight, training, evaluate=look)
    for stop in (1, 3, 7):
        resumed = case.fresh()
        states: list[TrainState] = []
        run(
            case,
            resumed,
            training,
            evaluate=look,
            until=stop,
            save=lambda state, kept=states: kept.append(state.kept()),
        )
        other = case.fresh(seed=99)  # nothing may be left over from the delta that was stopped
        torch.manual_seed(12345)
        run(case, other, training, evaluate=look, resume=states[-1])
        for name, tensor in straight.state().items():
            assert torch.equal(tensor, other.state()[name]), (stop, name)


# --- 8: what does not fit ---


def test_everything_that_does_not_fit_is_named_at_once(case: Case) -> None:
    tensors = case.moved().export()
    names = list(tensors)
    bad = dict(tensors)
    missing = names[0]
    del bad[missing]
    bad["surplus.tensor"] = torch.zeros(3)
    if len(names) > 2:
        bad[names[1]] = torch.zeros(1, 2, 3)
        bad[names[2]] = torch.full_like(tensors[names[2]], float("nan"))
    with pytest.raises(Mismatch) as caught:
        case.method.load(case.config, case.base, bad)
    message = str(caught.value)
    assert missing in message
    assert "surplus.tensor" in message
    if len(names) > 2:
        assert names[1] in message
        assert names[2] in message
        assert "finite" in message


def test_another_base_is_refused(case: Case) -> None:
    tensors = case.moved().export()
    other = shared_base("opt-post-norm")  # narrower embeddings, two layers' worth of other names
    with pytest.raises(Mismatch):
        case.method.load(case.config, other, {**tensors, "layers.9.attn.q.A": torch.zeros(1)})


# --- 9: merging ---


def test_merged_equals_unmerged_or_says_why_not(case: Case) -> None:
    delta, reason = case.moved(), ""
    try:
        merged = case.method.merge(delta, case.base)
    except NotMergeable as error:
        merged, reason = {}, str(error)
    assert case.method.unmergeable(case.config) in ("", reason), "without a base it says the same, or nothing"
    if not merged:
        assert "base" in reason
        return
    wanted = outputs(case.base, delta, ROWS)

    class Merged(NoEdits):
        def weights(self) -> dict[str, torch.Tensor]:
            return {**{n: p.detach() for n, p in case.base.parameters().items()}, **merged}

    for a, b in zip(outputs(case.base, Merged(), ROWS), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


# --- and what must never happen quietly ---


def test_a_loss_that_is_not_finite_stops_before_the_step(case: Case) -> None:
    delta = case.fresh()
    first = next(iter(delta.trainable().values()))
    with torch.no_grad():
        first.fill_(float("nan"))
    before = {name: t.clone() for name, t in delta.state().items()}
    with pytest.raises(Diverged, match="not finite"):
        run(case, delta, FIVE_STEPS)
    for name, tensor in delta.state().items():
        assert torch.equal(tensor.isnan(), before[name].isnan())
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


def test_micro_batches_do_not_change_the_step(case: Case) -> None:
    results = []
    rows = training_rows()
    for members in ([list(range(12))], [[0, 1, 2], [3], list(range(4, 12))]):
        delta = case.moved().eval()
        with case.base.bind(delta):
            count = sum(len(row.target) for row in rows)
            for part in members:
                (batch_loss(case.base, training_batch([rows[i] for i in part])) / count).backward()
        results.append({n: p.grad.clone() for n, p in delta.trainable().items() if p.grad is not None})
    assert results[0].keys() == results[1].keys() == delta.trainable().keys()
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-3, atol=1e-5)


def test_a_round_number_of_tokens_changes_nothing(case: Case) -> None:
    """What a base computes beside the rows, where it wants few different numbers of them, reaches nobody."""
    results = []
    for wanted in (False, True):
        delta = case.moved().eval()
        with pytest.MonkeyPatch.context() as patch, case.base.bind(delta):
            patch.setattr(round_numbers, "wanted", lambda *_, wanted=wanted: wanted)
            loss = batch_loss(case.base, training_batch(training_rows()))
            loss.backward()
        results.append({"loss": loss.detach()} | {n: p.grad for n, p in delta.trainable().items()})
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)
