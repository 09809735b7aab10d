"""Attention over finished adapters: only it trains, the result needs nothing else, and what cannot be fused says why.

Against adapter-hub itself it is held in `tests/parity/test_adapter_hub_composed.py`; here against the paper's formula.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tritune as tt
from tests.oracles import base_of, bottleneck, packed_logits, rows_of
from tests.unit.exchange.conftest import adapted
from tritune.adaptation import Adaptation
from tritune.composition.fusing import fuse
from tritune.composition.stacking import stack
from tritune.errors import Mismatch
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.fusion import METHOD, Fusion
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.tiny import tiny_base
from tritune.run import Training
from tritune.tasks.classification import Classification
from tritune.trial import Trial

TINY = "llama-tied"
ROWS = rows_of((7, 1, 12))
WIDE, NARROW = Bottleneck(reduction_factor=2.0), Bottleneck(reduction_factor=8.0, nonlinearity="gelu", scaling=2.0)
QUICK = Training(epochs=1, batch_tokens=300, evaluations=1, learning_rate=1e-2)


def task() -> Classification:
    made = [{"text": f"{sign}{i}", "label": label} for i in range(20) for sign, label in (("+", "yes"), ("-", "no"))]
    return tt.classification(train=made, dev=made[:8], test=made[8:16], allow_duplicates=True)  # type: ignore[no-any-return]


def parts() -> list[Adaptation]:
    return [adapted(base_of(TINY), WIDE, size=0.2), adapted(base_of(TINY), NARROW, size=0.3)]


def test_the_attention_is_the_papers_formula() -> None:
    base, config = base_of(TINY), Fusion(parts=(WIDE, NARROW))
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s, generator=generator) / 4 for n, s in METHOD.shapes(config, base).items()}
    delta = METHOD.load(config, base, tensors)
    site = delta.sites()[0]
    x, y = torch.randn(5, site.d_out, generator=generator), torch.randn(5, site.d_out, generator=generator)
    mine = {n.removeprefix(f"{site.key}."): t for n, t in tensors.items() if n.startswith(site.key)}
    outputs = []
    for i, part in enumerate((WIDE, NARROW)):
        start = f"parts.{i}.{site.key}."
        own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        outputs.append(bottleneck(x + y, own, part.nonlinearity, float(part.scaling)))
    wanted = []
    for n in range(5):  # token by token, adapter by adapter
        query = mine["query.weight"] @ (x + y)[n] + mine["query.bias"]
        scores = torch.stack([query @ (mine["key.weight"] @ a[n]) for a in outputs])
        share = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
        wanted.append(y[n] + sum(s * (mine["value.weight"] @ a[n]) for s, a in zip(share, outputs, strict=True)))
    torch.testing.assert_close(delta.edit(site, x, y, None), torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_only_the_attention_trains_and_the_parts_are_stored_with_it(tmp_path: Path) -> None:
    finished = parts()
    before = [part.delta.export() for part in finished]
    found = fuse(finished, task(), training=QUICK)
    exported = found.delta.export()
    for i, own in enumerate(before):
        for name, tensor in own.items():
            assert torch.equal(exported[f"parts.{i}.{name}"], tensor)
    key = found.delta.sites()[0].key
    value = exported[f"{key}.value.weight"]
    assert not torch.allclose(value, torch.eye(len(value)), atol=1e-3)
    found.save(tmp_path / "fused")
    loaded = tt.load(tmp_path / "fused", base=base_of(TINY))
    assert loaded.predict(["+1", "-1"]) == found.predict(["+1", "-1"])
    made = loaded.origin.made
    assert made is not None
    assert [part["method"] for part in made["parts"]] == ["bottleneck", "bottleneck"]  # type: ignore[attr-defined]


@torch.no_grad()
def test_it_starts_close_to_the_mean_of_the_parts() -> None:
    """V is close to the identity, and scores close to zero weigh all alike."""
    base = base_of(TINY)
    finished = [adapted(base, WIDE, size=0.05), adapted(base, NARROW, size=0.05)]
    generator = torch.Generator().manual_seed(0)
    learned = {f"parts.{i}.{n}": t for i, part in enumerate(finished) for n, t in part.delta.export().items()}
    delta = Trial(base, task(), Fusion(parts=(WIDE, NARROW)), QUICK, 1e-3, 0, learned=learned).delta
    site = delta.sites()[0]
    x, y = torch.randn(6, site.d_out, generator=generator), torch.randn(6, site.d_out, generator=generator)
    mean = sum(part.delta.edit(site, x, y, None) for part in finished) / 2
    assert float((delta.edit(site, x, y, None) - mean).abs().max()) < 0.2 * float((mean - y).abs().max())


def test_a_fusion_stacks_with_what_acts_elsewhere() -> None:
    fused, lora = fuse(parts(), task(), training=QUICK), adapted(base_of(TINY), LoRA(rank=2))
    both = stack([lora, fused], task=fused.task)

    @torch.no_grad()
    def answers(one: Adaptation) -> list[Tensor]:
        with one.base.bind(one.delta):
            return packed_logits(one.base, ROWS)

    assert not torch.allclose(answers(both)[0], answers(fused)[0], atol=1e-3)
    assert not torch.allclose(answers(both)[0], answers(lora)[0], atol=1e-3)


# --- what cannot be fused ---


def test_every_reason_is_told_at_once() -> None:
    base = base_of(TINY)
    others = [adapted(base, c) for c in (LoRA(rank=2), PTuning(tokens=2, encoder="none"))]
    apart = adapted(base, Bottleneck(placement="par"))
    normed = adapted(base, Bottleneck(ln_after=True))
    there = adapted(tiny_base(TINY, seed=1), WIDE)
    with pytest.raises(Mismatch) as caught:
        fuse([*parts(), *others, apart, normed, there], task())
    told = {problem.where: problem.what for problem in caught.value.problems}
    assert "no bottleneck adapter" in told["part 3 (lora)"]
    assert "no bottleneck adapter" in told["part 4 (ptuning)"]
    assert "par in part 5" in told["placement"]
    assert "addend" in told["part 6, ln_after"]
    assert "part 7, weights of the base" in told
    with pytest.raises(Mismatch, match="alone"):
        fuse(parts()[:1], task())


def test_training_does_not_begin_without_finished_parts() -> None:
    """A fusion of adapters that know nothing would train, and be nothing."""
    with pytest.raises(Mismatch, match=r"parts\.0\..*missing"):
        tt.adapt(base_of(TINY), task(), method=Fusion(parts=(WIDE, NARROW)))
    with pytest.raises(Mismatch, match=r"parts\.1\.parts\.0\..*missing"):
        tt.adapt(base_of(TINY), task(), method=tt.Stack(parts=[LoRA(), Fusion(parts=(WIDE, NARROW))]))
    with pytest.raises(Mismatch, match="does not belong"):
        Trial(base_of(TINY), task(), LoRA(), QUICK, 1e-3, 0, learned={"surplus": torch.zeros(1)})
