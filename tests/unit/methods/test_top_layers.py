"""Adapters in the last layers only: where they act, what is refused, and that documents from before still read."""

from __future__ import annotations

import pytest

import tritune as tt
from tests.oracles import base_of
from tests.unit.models.test_depth import counted, proved
from tritune.errors import Mismatch
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.full import Full
from tritune.methods.fusion import Fusion
from tritune.methods.ia3 import IA3
from tritune.methods.lora import LoRA
from tritune.models.base import LINEAR_ROLES, Role
from tritune.run import Training
from tritune.spec import MethodConfig
from tritune.trial import Trial

ADAPTERS = (LoRA, IA3, Bottleneck)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_only_the_last_layers_are_acted_in(kind: type[LoRA | IA3 | Bottleneck]) -> None:
    base = base_of("gpt2")
    whole = kind().sites(base)
    assert {site.layer for site in whole} == {0, 1, 2}
    for n in (1, 2, 3):
        assert kind(top_layers=n).sites(base) == tuple(site for site in whole if site.layer >= 3 - n)


def test_the_ends_are_in_no_layer() -> None:
    sites = LoRA(roles=(Role.EMBED, Role.ATTN_Q, Role.HEAD), top_layers=1).sites(base_of("llama"))
    assert [site.key for site in sites] == ["embed", "layers.2.attn.q", "head"]


def test_left_out_among_the_last_ones() -> None:
    base = base_of("llama")
    sites = Bottleneck(top_layers=2, leave_out=(2,), reduction_factor={"1": 4.0}).sites(base)
    assert [site.key for site in sites] == ["layers.1.block.mlp"]
    with pytest.raises(Mismatch, match="leaves no layer"):
        Bottleneck(top_layers=1, leave_out=(2,)).sites(base)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LoRA(top_layers=4, roles=(Role.MLP_GATE,)), ["role 'mlp.gate'", "top_layers"]),
        (IA3(top_layers=4, output_roles=(Role.MLP_GATE,)), ["role 'mlp.gate'", "top_layers"]),
        (Bottleneck(top_layers=4, leave_out=(7,)), ["leave_out, layer 7", "top_layers"]),
    ],
)
def test_more_layers_than_there_are_is_one_problem_among_others(
    config: LoRA | IA3 | Bottleneck, wanted: list[str]
) -> None:
    with pytest.raises(Mismatch) as caught:
        config.sites(base_of("gpt2"))
    assert [p.where for p in caught.value.problems] == wanted
    assert "4, but the base has 3 layers" in str(caught.value)


@pytest.mark.parametrize("kind", [*ADAPTERS, Full])
def test_none_is_no_number_of_layers(kind: type[MethodConfig]) -> None:
    with pytest.raises(Mismatch, match="greater than or equal to 1"):
        kind.read({"top_layers": 0}, "config")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_document_from_before_means_all_layers(kind: type[LoRA | IA3 | Bottleneck]) -> None:
    document = kind().model_dump(mode="json")
    del document["top_layers"]
    assert kind.read(document, "config") == kind()


def test_adapters_in_different_layers_are_not_fused() -> None:
    with pytest.raises(ValueError, match="top_layers: 1 in part 1, None in part 2"):
        Fusion(parts=(Bottleneck(top_layers=1), Bottleneck()))


def test_a_run_reads_its_texts_through_the_lower_layers_once() -> None:
    """Answers of several tokens included, in training and on dev; and its result is stored, loaded and used as any."""
    base = base_of("llama")
    rows = [{"text": f"abc{i}", "label": "one" if i % 2 else "another"} for i in range(12)]
    task = tt.classification(train=rows[:8], dev=rows[8:], template="{{ text }}=", allow_duplicates=True)
    training = Training(epochs=4.0, batch_tokens=80, evaluations=3)
    trial = Trial(base, task, LoRA(rank=2, top_layers=1), training, 1e-2, 0)
    proved(base, 2)
    with counted(base, 0) as seen:
        events = list(trial.events())
    train, dev = trial._train.encoded, trial._dev.encoded
    common = len("abc")
    once = sum(row.n_trained - common for row in train) + sum(
        len(row.context) - common + sum(len(choice) - 1 for choice in row.choices) for row in dev
    )
    assert events[-1].kind == "done"
    assert sum(seen) == once + 2 * common
    adaptation = trial.adaptation()
    assert {site.role for site in adaptation.delta.sites()} == set(LINEAR_ROLES)
    assert {site.layer for site in adaptation.delta.sites()} == {2}
