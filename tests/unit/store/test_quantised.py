"""Adaptations of quantised bases: they come back on the form they were trained on; on another only when that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tritune as tt
from tests.unit.store.test_load import LORA, adaptation
from tritune.adaptation import Adaptation
from tritune.errors import Mismatch
from tritune.methods import METHODS, method
from tritune.models.load import load_base
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.spec import Scope
from tritune.store.manifest import Manifest
from tritune.store.registry import MANIFEST

TEXTS = ["good one", "very bad", "so so"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("bases")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITUNE_CACHE", str(root / "cache"))
    base = tiny_base("llama-tied")
    base.save_pretrained(root / "tiny", base.parameters())
    yield root / "tiny"
    patch.undo()


@pytest.fixture(scope="module")
def nf4(folder: Path) -> Base:
    return load_base(folder, dtype="float32", device="cpu", quantise="nf4")


@pytest.fixture(scope="module")
def floats(folder: Path) -> Base:
    return load_base(folder, dtype="float32", device="cpu")


def test_a_base_is_named_by_what_it_was_quantised_from(nf4: Base, floats: Base) -> None:
    assert nf4.digests == floats.digests
    assert (nf4.quantised, floats.quantised) == ("nf4", None)
    assert nf4.bytes < floats.bytes


@pytest.mark.parametrize("kind", [kind for kind in METHODS if method(kind).scope is Scope.ROW])
def test_it_comes_back_on_the_form_it_was_trained_on(kind: str, nf4: Base, folder: Path, tmp_path: Path) -> None:
    saved = adaptation(nf4, method(kind).variants[0])
    stored = saved.save(tmp_path / "mine")
    assert stored.manifest.base.quantised == "nf4"
    again = tt.load(tmp_path / "mine", base=str(folder))
    assert again.base.quantised == "nf4"
    assert again.predict(TEXTS) == saved.predict(TEXTS)


def test_another_form_is_refused_until_it_is_asked_for(nf4: Base, floats: Base, folder: Path, tmp_path: Path) -> None:
    saved = adaptation(nf4, LORA)
    saved.save(tmp_path / "mine")
    with pytest.raises(Mismatch) as caught:
        tt.load(tmp_path / "mine", base=floats)
    assert [p.where for p in caught.value.problems] == ["quantisation of the base"]
    assert "'none', expected 'nf4'; if it is meant to answer on this one, say quantise='none'" in str(caught.value)
    for asked in (
        tt.load(tmp_path / "mine", base=floats, quantise="none"),
        tt.load(tmp_path / "mine", base=str(folder), quantise="none"),
    ):
        assert asked.base.quantised is None
        assert asked.predict(TEXTS) == Adaptation(floats, saved.task, LORA, saved.delta.export(), saved.origin).predict(
            TEXTS
        )
        assert asked.predict(TEXTS) != saved.predict(TEXTS)
    assert tt.load(tmp_path / "mine", base=str(folder), quantise="int8").base.quantised == "int8"


def test_what_learned_on_floats_is_not_answered_by_codes(nf4: Base, floats: Base, tmp_path: Path) -> None:
    adaptation(floats, LORA).save(tmp_path / "mine")
    with pytest.raises(Mismatch, match="'nf4', expected 'none'"):
        tt.load(tmp_path / "mine", base=nf4)
    assert tt.load(tmp_path / "mine", base=nf4, quantise="nf4").base is nf4


def test_manifests_from_before_there_was_a_form_keep_their_names(floats: Base, tmp_path: Path) -> None:
    stored = adaptation(floats, LORA).save(tmp_path / "mine")
    document = json.loads((tmp_path / "mine" / MANIFEST).read_text())
    assert document.pop("id") == stored.id
    assert "quantised" not in document["base"]
    assert Manifest.read(document, "test").id() == stored.id
    in_nf4 = Manifest.read(document | {"base": document["base"] | {"quantised": "nf4"}}, "test")
    assert in_nf4.id() != stored.id
    assert Manifest.read(in_nf4.model_dump(mode="json"), "test") == in_nf4


@torch.no_grad()
def test_a_folder_of_a_quantised_base_holds_numbers(nf4: Base, tmp_path: Path) -> None:
    """What is saved is the dequantised base, that anybody can load."""
    nf4.save_pretrained(tmp_path, nf4.parameters())
    again, own = load_base(tmp_path, dtype="float32", device="cpu").parameters(), nf4.parameters()
    assert list(again) == list(own)
    assert all(torch.equal(again[name], own[name]) for name in own)
