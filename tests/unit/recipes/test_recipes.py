"""YAML without surprises, and settings in layers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritune import recipes
from tritune.errors import Mismatch
from tritune.methods import METHODS, method
from tritune.misfits import fields_of, inside, misfits
from tritune.recipes import documents
from tritune.recipes.settings import CompareSettings, TrainSettings, layered


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("1e-3", 1e-3), ("-.5", -0.5),
        ("12:30", "12:30"), ("0755", 755), ("2020-01-01", "2020-01-01"), ("1_000", "1_000"), ("~", None), ("", None),
        ("null", None), ("'1'", "1"), ("0x10", "0x10"), (".inf", ".inf"), ("привет", "привет"),
    ],
)  # fmt: skip
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    assert documents.parse(f"key: {text}", "x") == {"key": value}


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(min_size=1), PLAIN, max_size=4))
def test_what_is_written_is_read_back(document: dict[str, Any]) -> None:
    assert documents.parse(documents.text(document), "x") == document


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: is no YAML: the key 'a' appears twice"),
        ("a: [1", "line 1"),
        ("- a", "expected keys with values"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("? [a]\n: 1", "a key has to be a plain word"),
    ],
)
def test_what_is_no_document_is_refused(text: str, what: str) -> None:
    with pytest.raises(Mismatch) as caught:
        documents.parse(text, "mine.yaml")
    assert what in str(caught.value)
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("name", recipes.packaged())
def test_packaged_recipes_are_settings(name: str) -> None:
    found = layered(CompareSettings, {}, recipes.read(name), name)
    assert found.train is not None
    assert set(found.kinds()) <= set(METHODS)


def test_the_command_line_wins_key_by_key() -> None:
    recipe = {"epochs": 2, "configs": {"lora": {"rank": 2, "alpha": 4.0}}, "seeds": [1, 2]}
    found = layered(CompareSettings, {"configs": {"lora": {"rank": 8}}, "seeds": (0,)}, recipe, "mine.yaml")
    assert found.configs == {"lora": {"rank": 8, "alpha": 4.0}}
    assert (found.epochs, found.seeds, found.warmup) == (2.0, (0,), CompareSettings().warmup)


def test_every_problem_of_every_layer_is_named() -> None:
    recipe = {"epoch": 1, "label_words": {"a": 2}, "template": {"kontext": "x"}, "configs": {"lorra": {}}}
    with pytest.raises(Mismatch) as caught:
        layered(TrainSettings, {"method": "nothing", "clip": -1}, recipe, "mine.yaml")
    places = {problem.where for problem in caught.value.problems}
    assert {"mine.yaml, 'epoch'", "mine.yaml, 'label_words.a'", "mine.yaml, 'configs'"} <= places
    assert {"command line, 'method'", "command line, 'clip'"} <= places
    assert any("did you mean 'context'" in problem.what for problem in caught.value.problems)


@pytest.mark.parametrize("kind", METHODS)
def test_configs_of_methods_are_checked_like_settings(kind: str) -> None:
    config = method(kind).Config
    assert misfits(config, {}, inside("config")) == []
    (unknown,) = misfits(config, {"no_such_thing": 1}, inside("config"))
    assert unknown.where == "config, 'no_such_thing'"
    assert all(name in fields_of(config) for name in config.model_fields)


def test_settings_that_contradict_each_other_are_a_problem_of_the_whole() -> None:
    config = method("ptuning").Config
    (problem,) = misfits(config, {"tokens": 20, "placement": "around"}, inside("mine.yaml"))
    assert problem.where == "mine.yaml"
    assert problem.what.startswith("'front' goes with placement")
    (missing,) = misfits(method("stack").Config, {}, inside("mine.yaml"))
    assert (missing.where, missing.what) == ("mine.yaml, 'parts'", "not given")
